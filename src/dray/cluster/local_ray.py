"""Ray before it is connected to: the token that a cluster wants, the refusal of one that wants
none, and a local Ray that nobody else can reach or read.

A local Ray lives in a folder of its own that only its user can enter, with a token that is in no
file. So nothing is left in the home folder or in the way of another Ray on this machine. Of a Ray
that does not start no process stays.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import shutil
import socket
import ssl
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from dray.cluster.nodes import is_head, no_answer
from dray.errors import DrayError, PlanError, RunFailed, one_line
from dray.processes import worker_setup
from dray.processes.signals import kept_handlers
from dray.processes.streams import warn
from dray.redaction import hide, redact

_MODE, _TOKEN, _TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
TOKEN_RULE = (
    "it lies in ~/.ray/auth_token, in the file that RAY_AUTH_TOKEN_PATH names, or in "
    "RAY_AUTH_TOKEN",
    "copy it from the head (`ray get-auth-token` there)",
)
"""Where the token of a cluster is looked for, and where it comes from."""
OPEN_CLUSTER = "DRAY_OPEN_CLUSTER"
"""The variable that names hosts, with commas between them, whose clusters may go without a
token."""
_TLS_PARTS = ("CA_CERT", "SERVER_CERT", "SERVER_KEY")
TLS_RULE = "both sides have RAY_USE_TLS=1 and certificates of one authority, or neither has"
TLS_WAY_OUT = "docs/security.md makes some"
TLS_SECONDS = 3.0
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What Ray sets for the command of a job."""
_ONLOOKERS = ("start_api_server", "start_monitor", "start_log_monitor")
_RAYLET = "start_raylet"
"""Methods of Ray's node, private ones: where a version of Ray has them no more, it starts all that
it wants."""
_LONGEST_PLACE = 27
"""Characters of a folder in which Ray's sockets still have paths that the system takes (107 in
all)."""


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """Environment variables for the time of the block, known to Ray, which looks at some of them
    once alone."""
    before = {name: os.environ.get(name) for name in (*changes, _MODE)}
    os.environ.update(changes)
    _forget_token()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        _forget_token()


def _forget_token() -> None:
    raylet = _raylet()
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def token_header() -> dict[str, str]:
    """The token that is here as a header of HTTP; none: there is none. It is hidden in all that
    this process says from then on. Warns where its file can be read by others. Raises PlanError for
    a file that was named and holds none."""
    from ray.exceptions import AuthenticationError

    loader = _raylet().AuthenticationTokenLoader.instance()
    try:
        header = dict(loader.get_token_for_http_header(ignore_auth_mode=True))
    except AuthenticationError as error:
        place = os.environ.get(_TOKEN_PATH, "")
        raise PlanError(_TOKEN_PATH, f"{place} holds no token", *TOKEN_RULE) from error
    for value in header.values():
        hide(str(value).rpartition(" ")[2])
    if header and not os.environ.get(_TOKEN):
        _warn_of_readers(os.environ.get(_TOKEN_PATH) or str(_home_token()))
    return header


def _home_token() -> Path:
    """Where Ray itself looks for a token. Raises RuntimeError where there is no home."""
    return Path.home() / ".ray" / "auth_token"


@cache
def _warn_of_readers(path: str) -> None:
    """Say, once, that the file of a token can be read by others, to whoever can change it."""
    with suppress(OSError):
        found = Path(path).stat()
        if found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) & 0o077:
            warn(f"{path} holds a cluster's token and others can read it: chmod 600 {path}")


def _raylet() -> Any:
    """Ray's compiled half, whose stubs know nothing of what is needed here."""
    return import_module("ray._raylet")


# ---- a cluster ---------------------------------------------------------------------------------


@contextmanager
def authenticated(address: str) -> Iterator[None]:
    """Have Ray send the token that lies there, while the block is connected to a cluster that wants
    one, and no token to one that wants none.

    Raises PlanError where no head answers; where it wants one and there is none, or another one;
    where it wants none though others can reach it (`check_open`); and where one side alone speaks
    TLS, or they do not take each other's certificates.
    """
    from ray.exceptions import AuthenticationError

    if address.startswith("ray://"):
        yield
        return
    _check_tls(address)
    host, _, port = address.rpartition(":")
    if port.isdigit() and not is_head(host, int(port)):
        raise no_answer(address)
    changes = {_MODE: "disabled"}
    try:
        with _environment(changes):
            answered = _ask(address)
        if answered:
            check_open(address, address.rpartition(":")[0])
        else:
            changes = {}  # nothing is known of it: connecting will tell
    except AuthenticationError as error:
        changes = {_MODE: "token"}
        with _environment(changes):
            _ask_with_token(address, error)
    if not changes:
        yield
        return
    with _environment(changes):
        yield


def _check_tls(address: str) -> None:
    """Raise PlanError where Ray would try for many minutes to speak with a cluster that speaks TLS
    otherwise than this process is told to."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return
    names = {part: os.environ.get(f"RAY_TLS_{part}", "") for part in _TLS_PARTS}
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if _refusal(host, int(port), context, listens=False):
            return
        what = "speaks TLS, and this process does not"
    elif not all(names.values()):
        missing = ", ".join(f"RAY_TLS_{part}" for part, name in names.items() if not name)
        raise PlanError("RAY_USE_TLS", f"is set without {missing}", TLS_RULE, TLS_WAY_OUT)
    else:
        try:
            context = ssl.create_default_context(cafile=names["CA_CERT"])
            context.load_cert_chain(names["SERVER_CERT"], names["SERVER_KEY"])
        except OSError as error:  # ssl.SSLError is one
            raise PlanError(
                "RAY_USE_TLS",
                f"its files cannot be used ({one_line(error)})",
                TLS_RULE,
                TLS_WAY_OUT,
            ) from error
        reason = _refusal(host, int(port), context)
        if not reason:
            return
        what = f"and this process do not agree on TLS ({reason})"
    raise PlanError("--address", f"the cluster at {address} {what}", TLS_RULE, TLS_WAY_OUT)


def _refusal(host: str, port: int, context: ssl.SSLContext, *, listens: bool = True) -> str:
    """Why no TLS is spoken there; empty: it is. `listens`: hear whether the other side takes our
    certificate, which it says after the handshake."""
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), TLS_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            if not listens:
                return ""
            secured.settimeout(1.0)
            with suppress(TimeoutError):  # it has nothing against it
                return "" if secured.recv(1) else "the connection was closed"
            return ""
    except OSError as error:
        return one_line(error)


def check_open(address: str, host: str) -> None:
    """Raise PlanError for a cluster that asked for no token and is not on loopback: whoever reaches
    it runs code where this run's data and credentials are. One that OPEN_CLUSTER names is let pass,
    and so is the one whose job this process is."""
    named = host and host in os.environ.get(OPEN_CLUSTER, "").split(",")
    if _is_loopback(host) or named or IN_JOB in os.environ:
        return
    raise PlanError(
        "--address",
        f"the cluster at {address} asks for no token",
        "whoever reaches such a cluster runs code on it",
        f"start it with RAY_AUTH_MODE=token (docs/security.md); to use it as it is: "
        f"{OPEN_CLUSTER}={host}",
    )


def _is_loopback(host: str) -> bool:
    """Whether a host is this machine by an address that no other machine reaches."""
    if not host:
        return False
    try:
        found = {str(place[4][0]) for place in socket.getaddrinfo(host.strip("[]"), None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(one.partition("%")[0]).is_loopback for one in found)


def _ask_with_token(address: str, refused: Exception) -> None:
    from ray.exceptions import AuthenticationError

    if not token_header():
        raise PlanError(
            "--address",
            f"the cluster at {address} uses token authentication and there is no token",
            *TOKEN_RULE,
        ) from refused
    try:
        _ask(address)
    except AuthenticationError as error:
        raise PlanError(
            "--address",
            f"the cluster at {address} uses token authentication with another token than the "
            "one that is here",
            *TOKEN_RULE,
        ) from error


def _ask(address: str) -> bool:
    """Ask the cluster for a word; whether it gave one. Raises AuthenticationError; what else goes
    wrong is found out by connecting."""
    from ray.exceptions import AuthenticationError, RayError

    with _silent_stderr():
        try:
            _raylet().GcsClient(address=address)
        except AuthenticationError:
            raise
        except (RayError, RuntimeError, ValueError):
            return False
    return True


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Ray's C++ says what was refused before Python can."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def command_without_secrets() -> Iterator[None]:
    """Have a Ray that is joined in the block keep this process' command line without secrets: it is
    shown to all who may see the cluster's jobs. Ray's function for it is private: where a version
    has it no more, the command line is kept as it is."""
    utils: Any = import_module("ray._private.utils")
    own = getattr(utils, "get_entrypoint_name", None)
    if own is None:
        yield
        return
    utils.get_entrypoint_name = lambda: redact(own())
    try:
        yield
    finally:
        utils.get_entrypoint_name = own


# ---- a Ray of our own --------------------------------------------------------------------------


@contextmanager
def local_ray(**options: Any) -> Iterator[None]:
    """A Ray on this machine for as long as the block runs. Its folder stays where a run failed:
    logs are in it.

    Raises PlanError if it cannot start.
    """
    import ray

    folder = _make_folder()
    private = {} if _has_own_token() else {_TOKEN: secrets.token_hex(32)}
    keep = True
    try:
        with _environment(private):
            _start(folder, options)
            try:
                yield
            finally:
                ray.shutdown()
        keep = False
    except (DrayError, KeyboardInterrupt, GeneratorExit) as error:
        keep = isinstance(error, RunFailed)
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _start(folder: str, options: dict[str, Any]) -> None:
    """Start Ray, a second time where a busy machine took longer than the half minute that Ray waits
    for itself."""
    import ray

    for is_last in (False, True):
        try:
            leanness = nullcontext() if options.get("include_dashboard") else lean()
            quiet = command_without_secrets()
            with _without_orphans(), kept_handlers(), leanness, _groups_of_their_own(), quiet:
                ray.init(address="local", _temp_dir=f"{folder}/r", **options)
            return
        except Exception as error:  # Ray raises Exception itself
            told = " ".join(str(error).split())[:200] or type(error).__name__
            if is_last or "timed out" not in told:
                raise PlanError(
                    "Ray",
                    f"could not be started on this machine ({told})",
                    "a local Ray needs a free core for half a minute, memory, and space in its "
                    "folder and /dev/shm",
                    "try again, give RAY_TMPDIR a short folder with space, or name a cluster with "
                    "--address",
                ) from error


@contextmanager
def lean(*, onlookers: bool = False) -> Iterator[None]:
    """Have a Ray that starts in the block go without the processes that only onlookers need, half
    of what its start costs: the dashboard's server, the autoscaler's monitor and what sends logs to
    the driver. And have it start its workers without importing itself (`worker_setup.py`).
    `onlookers`: leave those processes to it, where something asks Ray's state API, which waits half
    a minute for a server that is not there."""
    node = import_module("ray._private.node").Node
    names = (_RAYLET,) if onlookers else (_RAYLET, *_ONLOOKERS)
    own = {name: getattr(node, name) for name in names if hasattr(node, name)}

    def start_raylet(self: Any, *inputs: Any, **named: Any) -> Any:
        self._ray_params.setup_worker_path = worker_setup.__file__
        return own[_RAYLET](self, *inputs, **named)

    for name in own:
        setattr(node, name, start_raylet if name == _RAYLET else lambda *inputs, **named: None)
    try:
        yield
    finally:
        for name, start in own.items():
            setattr(node, name, start)


@contextmanager
def _groups_of_their_own() -> Iterator[None]:
    """Give each of Ray's processes that starts in the block a process group. `timeout`, schedulers
    and terminals signal the driver's whole group, and the state is saved by a driver that still has
    its cluster. Ray's class for processes is private: where a version has it no more, they stay in
    the driver's group."""
    services: Any = import_module("ray._private.services")
    if not hasattr(services, "ConsolePopen"):
        yield
        return
    own = services.ConsolePopen
    services.ConsolePopen = partial(own, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = own


@contextmanager
def _without_orphans() -> Iterator[None]:
    """If the block fails, end the processes that it has started."""
    import psutil
    import ray

    before = {process.pid for process in psutil.Process().children(recursive=True)}

    def end_orphans() -> None:
        ray.shutdown()
        orphans = [
            child for child in psutil.Process().children(recursive=True) if child.pid not in before
        ]
        for process in orphans:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        # They would write into their folder while it is removed.
        psutil.wait_procs(orphans, timeout=10)

    with ExitStack() as on_failure:
        on_failure.callback(end_orphans)
        yield
        on_failure.pop_all()


def _has_own_token() -> bool:
    """Whether the person has said how this Ray is to be guarded, or has a token that nobody else
    can read."""
    if (
        os.environ.get(_TOKEN)
        or os.environ.get(_TOKEN_PATH)
        or os.environ.get(_MODE, "token").lower() != "token"
    ):
        return True
    try:
        found = _home_token().stat()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return False
    return (
        found.st_uid == os.getuid()
        and not stat.S_IMODE(found.st_mode) & 0o077
        and found.st_size > 0
    )


def _make_folder() -> str:
    """A new folder for Ray's files that only this user can enter. Raises PlanError where there is
    no place for it."""
    wanted = [os.environ.get(name, "") for name in ("RAY_TMPDIR", "TMPDIR")]
    for place in (*wanted, "/tmp", "/var/tmp", "/dev/shm"):
        if not place or len(os.path.abspath(place)) > _LONGEST_PLACE:
            continue
        try:
            folder = tempfile.mkdtemp(prefix="dray", dir=os.path.abspath(place))
        except OSError:
            continue
        if (asked := os.environ.get("RAY_TMPDIR")) and asked != place:
            warn(
                f"Ray's files are in {place}: RAY_TMPDIR={asked} cannot be written or is too long "
                "for sockets"
            )
        return folder
    raise PlanError(
        "TMPDIR",
        "there is no folder for Ray's files",
        f"one that can be written, of {_LONGEST_PLACE} characters at most: sockets are in it",
        "set TMPDIR or RAY_TMPDIR, e.g. to /tmp",
    )
