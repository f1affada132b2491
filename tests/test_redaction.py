"""What is taken out of texts that are kept, and what must stay readable in them."""

from __future__ import annotations

import traceback

import pytest

from dray.redaction import HIDDEN, names_secret, redact, redact_error, redact_fields

SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"


@pytest.mark.parametrize(
    "text",
    [
        f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}@bucket/runs",
        f"cannot open s3://bucket/runs?access_key=AKIA&secret_key={SECRET}&region=eu",
        f"abfs://x@y.dfs.core.windows.net/p?sv=2024&sig={SECRET}1%3D",
        f"https://bucket.s3.amazonaws.com/x?X-Amz-Signature={SECRET}&X-Amz-Credential={SECRET}",
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        f"export WANDB_API_KEY='{SECRET}'",
        f'{{"password": "{SECRET}", "user": "me"}}',
        f"{{'api_key': '{SECRET}'}}",
        f"password: {SECRET}",
        f"Authorization: Bearer {SECRET}",
        f"authorization: Basic {SECRET}==",
        f"token={SECRET}7",
        f"HF_TOKEN={SECRET}7",
        f"hf_{SECRET}",
        f"a job with ghp_{SECRET} in it",
        f"DefaultEndpointsProtocol=https;AccountName=x;AccountKey={SECRET}==;EndpointSuffix=core",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n{SECRET}\n-----END RSA PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\n{SECRET}",
        f"postgresql+psycopg2://me:{SECRET}@db:5432/mlflow",
    ],
)
def test_a_secret_is_hidden(text: str):
    assert SECRET not in redact(text, {})
    assert HIDDEN in redact(text, {})


@pytest.mark.parametrize(
    "text",
    [
        "pad_token = 3, eos_token: </s>, token=17, num_tokens: 123456789012345678901",
        "step 12/50  loss 4.5123  1,234 tokens/s  ETA 3 min",
        "s3://bucket/runs/speeches/checkpoints/step-00000012",
        "KeyError: 'label'",
        "the key of the corpus is 3f2a99b1c0de4455",
        'File "/home/me/runs/x.py", line 3, in load_key',
        "rows_digest=3f2a99b1c0de4455aabbccddeeff0011",
        "pip install torch==2.13.0; user@host",
        "ValueError: max_position_embeddings: 512; vocab_size=8192",
        "tokenizer: {path: /data/tok}",
        "nccl: unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.21.5",
    ],
)
def test_what_is_no_secret_stays(text: str):
    assert redact(text, {}) == text


def test_the_place_of_a_uri_stays_readable():
    assert redact(f"s3://me:{SECRET}@bucket/runs?region=eu&secret_key={SECRET}", {}) == (
        f"s3://{HIDDEN}@bucket/runs?region=eu&secret_key={HIDDEN}"
    )


def test_a_secret_that_is_a_word_hides_no_name_that_another_needs():
    text = f"secret_key={SECRET}, it is secret"
    assert redact(text, {"DB_PASSWORD": "secret"}) == f"{HIDDEN}_key={HIDDEN}, it is {HIDDEN}"


def test_values_of_the_environment_are_found_without_their_names():
    environment = {
        "WANDB_API_KEY": SECRET,
        "MY_TOKEN": "a1b2c3d4e5",
        "OMP_NUM_THREADS": "12345678",
        "SSH_AUTH": "/run/user/agent",
        "RAY_AUTH_MODE": "token",
    }
    assert (
        redact(f"login with {SECRET} failed; a1b2c3d4e5", environment)
        == f"login with {HIDDEN} failed; {HIDDEN}"
    )
    assert redact("12345678 /run/user/agent token", environment) == "12345678 /run/user/agent token"


def test_a_tree_keeps_its_form():
    tree = {
        "rank": 0,
        "message": f"s3://a:{SECRET}@b",
        "env": [{"api_key": "x", "pad_token": "y"}],
        "none": None,
    }
    assert redact_fields(tree) == {
        "rank": 0,
        "message": f"s3://{HIDDEN}@b",
        "env": [{"api_key": HIDDEN, "pad_token": "y"}],
        "none": None,
    }


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("AWS_SECRET_ACCESS_KEY", True),
        ("WANDB_API_KEY", True),
        ("access_key", True),
        ("session_token", True),
        ("password", True),
        ("pad_token", False),
        ("num_tokens", False),
        ("key", False),
        ("corpus_key", False),
        ("tokenizer", False),
    ],
)
def test_names(name: str, is_one: bool):
    assert names_secret(name) is is_one


def test_an_error_is_freed_of_secrets_with_those_that_led_to_it():
    cause = OSError(2, f"secret_key={SECRET}", f"s3://me:{SECRET}@bucket")
    error = RuntimeError(f"password={SECRET}", 3)
    error.__cause__ = cause
    cause.__context__ = error  # a circle
    redact_error(error)
    assert SECRET not in "".join(traceback.format_exception(error))
    assert error.args[1] == 3
    assert cause.errno == 2
