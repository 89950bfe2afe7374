"""What the routes serve with: the parts that main.py has wired together."""

from dataclasses import dataclass, field

from app.admission import Admission
from app.classifier import Classifier
from app.explain import Explainer
from app.keys import ApiKeys
from app.metrics import Metrics
from app.settings import Settings
from app.spans import Spans
from app.turns import Turns


@dataclass(slots=True)
class Service:
    """One process's parts; `app.state.service` while the application runs."""

    settings: Settings
    admission: Admission
    classifier: Classifier
    explainer: Explainer
    metrics: Metrics
    keys: ApiKeys | None  # whoever has one of them may ask; None: everybody
    spans: Spans | None  # where they are exported
    model_info: bytes  # the answer of GET /model
    draining: bool = False  # told to stop: still serving, but no longer ready
    was_working: bool = True  # engine and decoders, when readiness was asked for last
    turns: Turns = field(default_factory=Turns)  # of bodies that are slow to read

    @property
    def is_ready(self) -> bool:
        """Return whether a balancer may send requests."""
        return not self.draining and self.classifier.is_ready
