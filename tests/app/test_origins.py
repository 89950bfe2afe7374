"""Which origins a page may have: as browsers send them, or start-up stops."""

import pytest

from app.errors import StartupError
from app.settings import read_settings


@pytest.mark.parametrize(
    "origins",
    [
        "",
        "*",
        "https://shop.example",
        "https://shop.example:8443, http://localhost:3000",
        "http://shop.example:443",
        "https://shop.example:4430",
        "https://[::1]:8443",
    ],
)
def test_origins_of_browsers(origins: str) -> None:
    """Scheme, host and a port that is not the scheme's own, separated by commas, are taken."""
    assert read_settings([], {"MIXER_CORS_ORIGINS": origins}).cors_origins == origins


@pytest.mark.parametrize(
    "origins",
    [
        "https://shop.example:443",
        "http://shop.example:80",
        "https://shop.example,http://shop.example:80",
        "https://shop.example:08443",
        "https://shop.example:65536",
        "https://Shop.example",
        "https://shop.example/",
        "https://shop.example\n",
        "*,https://shop.example",
    ],
)
def test_origins_that_no_browser_sends(origins: str) -> None:
    """What could never match stops start-up, as its own port does, which browsers leave out."""
    with pytest.raises(StartupError, match="MIXER_CORS_ORIGINS") as told:
        read_settings([], {"MIXER_CORS_ORIGINS": origins})
    assert "without a scheme's own port" in str(told.value)
