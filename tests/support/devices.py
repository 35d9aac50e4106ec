"""Where the tests' models are: on the processor, or on the device that ``QUERYMASK_TEST_DEVICE`` names."""

import os

DEVICE = os.environ.get("QUERYMASK_TEST_DEVICE", "cpu")
