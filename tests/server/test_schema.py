"""The served OpenAPI document, and requests that schemathesis makes of it: none is answered otherwise than it says."""

from __future__ import annotations

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

GETS = ("/", "/health", "/metrics", "/live", "/v1/models", "/v1/models/{model}", "/tokenizer_info")
POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
# Not positive_data_acceptance: what a model's context holds, its name, the order of a dialog are rules of no schema.
CHECKS = (not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance)
SETTINGS = hypothesis.settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)


@pytest.fixture(scope="module")
def document(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_path_is_in_the_document(document):
    assert set(document.raw_schema["paths"]) == {*GETS, *POSTS}


@pytest.mark.parametrize("path", [*GETS, *POSTS])
def test_requests_are_answered_as_the_document_says(document, path):
    @SETTINGS
    @hypothesis.given(document[path]["GET" if path in GETS else "POST"].as_strategy())
    def ask(case):
        _shorten(case.body)
        case.call_and_validate(checks=CHECKS, timeout=60)

    ask()


@pytest.mark.parametrize("path", POSTS)
def test_what_the_document_forbids_is_refused(document, path):
    @SETTINGS
    @hypothesis.given(document[path]["POST"].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def ask(case):
        case.call_and_validate(checks=(*CHECKS, negative_data_rejection), timeout=60)

    ask()


def _shorten(body):
    """Answers that end soon."""
    if isinstance(body, dict):
        for name in ("max_tokens", "max_completion_tokens", "n"):
            if isinstance(body.get(name), int):
                body[name] = min(body[name], 3)
