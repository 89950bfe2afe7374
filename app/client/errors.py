"""What may go wrong with one image, or with all."""


class ServerError(Exception):
    """The server, or the model file, cannot be used at all: the run ends."""


class ImageError(Exception):
    """This image cannot be classified; the others may."""
