"""What the exporter raises for anything its user can put right."""


class ExportError(Exception):
    """A source, a label file or a result that does not hold; the message is one plain line."""
