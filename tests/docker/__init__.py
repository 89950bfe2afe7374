"""Tests of the images and of the files under docker/."""
