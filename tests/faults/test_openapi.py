"""Promise 11, second half: the OpenAPI document tells the truth."""

import os

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.faults.conftest import Figure, Start

CASES = int(os.environ.get("FAULTS_CASES", "2000"))


# schemathesis warns of its own future; what it finds matters here, not how.
@pytest.mark.filterwarnings("ignore:::schemathesis")
@pytest.mark.slow
def test_openapi_document(fake: Start, figure: Figure) -> None:
    """2,000 cases made from the OpenAPI document are answered as it says."""
    schemathesis = pytest.importorskip("schemathesis", reason="it comes with the dev extra")
    checks = pytest.importorskip("schemathesis.specs.openapi.checks")
    # No schema can say which bytes are an image, so that valid data may well be refused.
    with fake() as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        each = -(-CASES // len(operations))
        count = rounds = 0
        while count < CASES:  # an operation without parameters has but a few different cases
            rounds += 1
            for operation in operations:

                @seed(rounds)
                @settings(
                    max_examples=each,
                    deadline=None,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                )
                @given(case=st.one_of(operation.as_strategy()))
                def check(case: object) -> None:
                    nonlocal count
                    count += 1
                    case.call_and_validate(  # type: ignore[attr-defined] # untyped
                        base_url=server.url, excluded_checks=[checks.positive_data_acceptance]
                    )

                check()
        figure(f"{count} cases over {len(operations)} operations, 0 failures")
        assert "Traceback" not in server.log.read_text()
