"""The places that runs lie in: a local folder and the tests' S3 server."""

from run_places import (  # noqa: F401
    failing_storage,
    impatient,
    local_run,
    proxy,
    run,
    s3_storage,
    spec,
    storage,
)
