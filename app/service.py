"""What the routes serve with: the parts that main.py has wired together."""

from dataclasses import dataclass

from app.admission import Admission
from app.classifier import Classifier
from app.explain import Explainer
from app.settings import Settings


@dataclass(slots=True)
class Service:
    """One process's parts; `app.state.service` while the application runs."""

    settings: Settings
    admission: Admission
    classifier: Classifier
    explainer: Explainer
    draining: bool = False  # told to stop: still serving, but no longer ready

    @property
    def is_ready(self) -> bool:
        """Return whether a balancer may send requests."""
        return not self.draining and self.classifier.is_ready
