from querymask.common.picture_names import PictureNames


def test_each_image_has_a_name_of_its_own() -> None:
    files = ["cam1/1.png", "cam2/1.png", "cam2/1.jpg", "1_2.png", "A.png", "x/a.png", "cam1\\1.png", "b.c.png", ".png"]
    names = PictureNames(".jpg")
    assert [names(file) for file in files] == [
        "1.jpg",
        "1_2.jpg",
        "1_3.jpg",
        "1_2_2.jpg",
        "A.jpg",
        "a_2.jpg",  # where case does not matter, a.jpg would overwrite A.jpg
        "1_4.jpg",
        "b.c.jpg",
        ".png.jpg",
    ]
