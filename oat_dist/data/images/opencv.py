"""OpenCV without threads of its own: the loader's threads are the parallelism, and a forked packer has none."""

import cv2

cv2.setNumThreads(0)
