"""schemathesis on the service's own OpenAPI document: `make serve-abuse`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CHECKS

from dray.serve.limits import Limits
from dray.serve.served import Served
from served_here import Address, served_here
from small_writer import save_small_writer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    folder = save_small_writer(tmp_path_factory.mktemp("described") / "writer")
    with served_here([Served(folder=str(folder))], Limits(max_tokens=8)) as address:
        yield address


def test_the_document_tells_all_that_the_service_does(service: Address):
    """No request that the document allows, and none that it does not, gives a server's error, or an
    answer of another form."""
    document = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    some = CHECKS.get_all()
    names = {
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "response_headers_conformance",
    }
    checks = [check for check in some if check.__name__ in names]
    assert len(checks) == len(names)
    operations = list(document.get_all_operations())
    assert len(operations) >= 10
    for result in operations:
        operation = result.ok()

        @settings(
            max_examples=60,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy())
        def ask(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=checks, timeout=60)

        ask()
