"""Data sets, augmentation and the mapper from data set entries to model inputs."""
