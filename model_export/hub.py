"""Fetch a timm model folder from the Hugging Face hub, or from its local cache without network."""

from dataclasses import dataclass
from pathlib import Path

from app.errors import first_line
from model_export.errors import ExportError

PREFIXES = ("hf-hub:", "hf_hub:")  # timm writes both
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the hub's names, the safe one first
_LOOK_UP_SECONDS = 10


@dataclass(frozen=True)
class Snapshot:
    """A model folder at one commit, in the local cache."""

    weights: Path
    config: Path
    address: str  # hf-hub:owner/name@commit


def fetch(address: str) -> Snapshot:
    """Fetch `address`, hf-hub:owner/name with an optional @revision.

    Raises:
        ExportError: no such model, no such revision, or neither network nor a cached copy.
    """
    # Imported here: no other source needs the hub's client.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = address.partition(":")[2].partition("@")
    try:
        info = HfApi().model_info(repository, revision=revision or None, timeout=_LOOK_UP_SECONDS)
        commit = info.sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ExportError(f"{address}: {first_line(error)}") from error
    except Exception:  # whatever its HTTP library raises without network: the cache may do
        commit = None
    for name in WEIGHTS:
        try:
            weights = _file(repository, name, revision, commit)
        except EntryNotFoundError:
            continue
        except Exception as error:  # the HTTP library's, for a download that broke off
            raise ExportError(f"{address}: {name}: {first_line(error)}") from error
        config = _config(address, repository, revision, commit)
        return Snapshot(weights, config, f"{PREFIXES[0]}{repository}@{weights.parent.name}")
    if commit is None:
        raise ExportError(
            f"{address}: the hub cannot be reached and the local cache has no copy; "
            "connect, or convert a downloaded folder"
        )
    raise ExportError(f"{address}: holds neither {WEIGHTS[0]} nor {WEIGHTS[1]}")


def _config(address: str, repository: str, revision: str, commit: str | None) -> Path:
    try:
        return _file(repository, "config.json", revision, commit)
    except Exception as error:  # not there, or the HTTP library's own
        raise ExportError(f"{address}: config.json: {first_line(error)}") from error


def _file(repository: str, name: str, revision: str, commit: str | None) -> Path:
    """Download one file of a known commit; without one, look in the cache alone."""
    from huggingface_hub import hf_hub_download

    found = hf_hub_download(
        repository, name, revision=commit or revision or None, local_files_only=commit is None
    )
    return Path(found)
