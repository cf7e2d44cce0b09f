"""What every suite shares: the ready file, the list of cases, their report.

A suite is a file with functions marked `@case`; `main()` runs them in order and prints one line each,
`PASS name`, `FAIL name: reason` or `SKIP name: reason`. A case marked `@case(proxied=True)` says something
about dynabase itself and is skipped when the ready file describes a plain PostgreSQL.
"""

import asyncio
import inspect
import json
import os
import signal
import sys
import traceback
from urllib.parse import unquote, urlsplit

# One case; the longest one moves 20 MB twice.
CASE_SECONDS = 90

with open(sys.argv[1], encoding="utf-8") as file:
    READY = json.load(file)
PLAIN = bool(READY.get("plain"))
ADMIN = READY["upstreams"]["postgres"]
_CASES = []


def case(function=None, *, proxied=False):
    if function is None:
        return lambda f: case(f, proxied=proxied)
    _CASES.append((function, proxied))
    return function


class Skip(Exception):
    """The case can't say anything here."""


def tenant(org):
    return next(t for t in READY["tenants"] if t["org_id"] == org)


def url(org, **parts):
    """The tenant's address, with `user`, `password` or `database` replaced."""
    plain = urlsplit(tenant(org)["urls"]["postgres"])
    user = parts.get("user", plain.username)
    password = parts.get("password", unquote(plain.password))
    database = parts.get("database", plain.path[1:])
    return f"postgres://{user}:{password}@{plain.hostname}:{plain.port}/{database}"


def libpq(address):
    """The address as the environment of libpq's programs, so that no token stands in a process list."""
    parts = urlsplit(address)
    return {
        **os.environ,
        "PGHOST": parts.hostname,
        "PGPORT": str(parts.port),
        "PGUSER": unquote(parts.username),
        "PGPASSWORD": unquote(parts.password or ""),
        "PGDATABASE": parts.path[1:],
        "PGSSLMODE": "disable",
        "PGCONNECT_TIMEOUT": "10",
    }


def equal(actual, expected):
    assert actual == expected, f"{actual!r}, expected {expected!r}"


class Raises:
    """`with Raises("57014"):` expects that SQLSTATE, or one of several."""

    def __init__(self, *codes):
        self.codes = codes
        self.error = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        assert error is not None, f"nothing was raised, expected {' or '.join(self.codes)}"
        code = getattr(error, "sqlstate", None)
        if code is None and not isinstance(error, AssertionError):
            code = next((known for known in self.codes if LOGIN_WORDS.get(known, "\0") in str(error)), None)
        assert code in self.codes, f"{code} {error}, expected {' or '.join(self.codes)}"
        self.error = error
        return True


# libpq gives an error at login no SQLSTATE, only its text; these are PostgreSQL's own words.
LOGIN_WORDS = {
    "28P01": "password authentication failed",
    "3D000": "does not exist",
    "53300": "too many connections",
    "42501": "permission denied",
    "55000": "not currently accepting connections",
    "0A000": "not supported",
}


def main():
    only = sys.argv[2:]
    failed = 0
    signal.signal(signal.SIGALRM, _too_long)
    for function, proxied in _CASES:
        name = function.__name__
        if only and name not in only:
            continue
        if proxied and PLAIN:
            print(f"SKIP {name}: only through dynabase", flush=True)
            continue
        signal.alarm(CASE_SECONDS)
        try:
            result = function()
            if inspect.iscoroutine(result):
                asyncio.run(result)
            print(f"PASS {name}", flush=True)
        except Skip as why:
            print(f"SKIP {name}: {why}", flush=True)
        except BaseException as error:  # a suite reports whatever a driver throws
            failed += 1
            where = traceback.extract_tb(error.__traceback__)
            ours = next((f for f in reversed(where) if f.filename.endswith(os.path.basename(sys.argv[0]))), where[-1])
            text = " ".join(str(error).split())[:400]
            print(f"FAIL {name}: line {ours.lineno}: {type(error).__name__}: {text}", flush=True)
        finally:
            signal.alarm(0)
    sys.exit(1 if failed else 0)


def _too_long(*_):
    raise TimeoutError(f"longer than {CASE_SECONDS} s")
