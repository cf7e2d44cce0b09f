"""convex from PyPI before the proxy: its HTTP client and its socket client, each refusal, and JS at the other end."""

import base64
import hashlib
import hmac
import itertools
import json
import os
import re
import subprocess
import tempfile
import threading
import time
import uuid
from pathlib import Path

from convex import ConvexClient, ConvexError
from convex.http_client import ConvexHttpClient
from harness import READY, case, equal, main, tenant

BASE = READY["tenants"][0]["urls"]["convex"]
HOME = Path(READY["catalog"]["path"]).parent
NODE = Path(__file__).parent / "node"
_numbers = itertools.count(1)


def token(org, seconds=3600, subject="python"):
    """A token of the development issuer."""
    toml = (HOME / "dynabase.toml").read_text()
    secret = re.search(r'^hs256_secret = "(.*)"$', toml, re.M)[1]
    issuer = re.search(r'^issuer = "(.*)"$', toml, re.M)[1]
    now = int(time.time())
    claims = {"iss": issuer, "aud": "authenticated", "sub": subject, "role": "authenticated", "iat": now,
              "exp": now + seconds, "org_id": org}

    def part(data):
        return base64.urlsafe_b64encode(data).rstrip(b"=")

    signed = part(json.dumps({"alg": "HS256", "typ": "JWT"}).encode()) + b"." + part(json.dumps(claims).encode())
    return (signed + b"." + part(hmac.new(secret.encode(), signed, hashlib.sha256).digest())).decode()


def write(record):
    """What an operator does by hand: the file is replaced at once."""
    folder = Path(READY["catalog"]["path"], "orgs")
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".edit-", delete=False) as file:
        json.dump(record, file)
    os.replace(file.name, folder / f"{record['_id']}.json")


def organisation(tier="FREE"):
    """One for a case alone, so that cases don't use up each other's limits."""
    org = f"py{os.getpid()}n{next(_numbers)}"
    write({"_id": org, "tier": tier, "status": "active", "epoch": 1})
    # The catalog's folder is watched.
    soon("it is known", lambda: quietly(lambda: http(token(org)).query("messages:whoami", {})))
    return org


def quietly(ask):
    try:
        return ask() is not None
    except Exception:
        return False


def soon(what, check, seconds=20):
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)


def http(credential):
    client = ConvexHttpClient(BASE)
    client.set_auth(credential)
    return client


def socket(credential):
    client = ConvexClient(BASE)
    client.set_auth(credential)
    return client


def channel():
    return f"c{uuid.uuid4()}"


class Watch:
    """A subscription that is read by a thread of its own."""

    def __init__(self, client, name, args):
        self.values, self.subscription = [], client.subscribe(name, args)
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        while True:
            try:
                self.values.append(next(self.subscription))
            except StopIteration:
                return
            except ConvexError as error:
                self.values.append(error)
            except Exception as error:  # a failed query without data
                self.values.append(error)

    def last(self):
        return self.values[-1] if self.values else None


def refused(ask, limit):
    try:
        ask()
    except ConvexError as error:
        equal(error.data["code"], "quota_exceeded")
        equal(error.data["limit"], limit)
        return error
    raise AssertionError("it was let in")


@case
def calls_over_http():
    client, c = http(tenant("acme")["token"]), channel()
    client.mutation("messages:send", {"channel": c, "body": "one"})
    client.action("messages:sendFromAction", {"channel": c, "body": "two"})
    equal([it["body"] for it in client.query("messages:list", {"channel": c})], ["one", "two"])
    try:
        client.mutation("messages:refuse", {})
        raise AssertionError("the function throws")
    except ConvexError as error:
        equal(error.data["code"], "app_says_no")
    try:
        http("not a token").query("messages:list", {"channel": c})
        raise AssertionError("it was let in")
    except Exception as error:
        assert "Unauthenticated" in str(error), error


@case
def what_javascript_sends_is_live_here_and_nowhere_else():
    c = channel()
    here, elsewhere = socket(tenant("umbrella")["token"]), socket(tenant("initech")["token"])
    seen, foreign = (Watch(it, "messages:list", {"channel": c}) for it in (here, elsewhere))
    soon("both are subscribed", lambda: seen.last() == [] and foreign.last() == [])
    script = """
        const { ConvexClient } = require('convex/browser');
        const { makeFunctionReference: ref } = require('convex/server');
        const [, url, token, channel] = process.argv;
        const client = new ConvexClient(url, { skipConvexDeploymentUrlCheck: true, expectAuth: true });
        client.setAuth(async () => token);
        client.mutation(ref('messages:send'), { channel, body: 'from JavaScript' }).then(() => process.exit(0));
    """
    subprocess.run(["node", "-e", script, BASE, tenant("umbrella")["token"], c], cwd=NODE, check=True, timeout=30)
    soon("it is here", lambda: [it["body"] for it in seen.last()] == ["from JavaScript"])
    # Its own write comes after whatever the other's could have caused.
    elsewhere.mutation("messages:send", {"channel": c, "body": "mine"})
    soon("its own", lambda: len(foreign.last()) == 1)
    equal([it["body"] for it in foreign.last()], ["mine"])
    equal([it["body"] for it in seen.last()], ["from JavaScript"])


@case
def calls_over_a_socket():
    client, c = socket(tenant("globex")["token"]), channel()
    client.mutation("messages:send", {"channel": c, "body": "one"})
    client.action("messages:sendFromAction", {"channel": c, "body": "two"})
    equal([it["body"] for it in client.query("messages:list", {"channel": c})], ["one", "two"])
    equal(client.query("messages:whoami", {})["org_id"], "globex")


@case
def subscriptions_are_refused_one_by_one():
    org, c = organisation(), channel()
    client = socket(token(org))
    seen = [Watch(client, "messages:big", {"channel": c, "bytes": float(n)}) for n in range(50)]
    soon("fifty", lambda: all(it.last() for it in seen))
    more = Watch(client, "messages:big", {"channel": c, "bytes": 1000.0})
    soon("the refusal", lambda: more.last())
    assert isinstance(more.last(), ConvexError), more.last()
    equal((more.last().data["limit"], more.last().data["max"]), ("subscriptions", 50))
    client.mutation("messages:send", {"channel": c, "body": "x"})
    soon("all others are live", lambda: all(it.last()["count"] == 1 for it in seen))


@case
def calls_over_the_rate_are_refused_one_by_one():
    org, c = organisation(), channel()
    client = socket(token(org))
    seen = Watch(client, "messages:list", {"channel": c})
    soon("the first result", lambda: seen.last() == [])
    good, bad = 0, []
    for n in range(150):
        try:
            client.mutation("messages:send", {"channel": c, "body": f"{n}"})
            good += 1
        except ConvexError as error:
            bad.append(error.data)
            if len(bad) >= 5:
                break
    assert good >= 80 and bad, f"{good} were let in, {len(bad)} refused"
    assert all(it["code"] == "quota_exceeded" and it["limit"] == "rate" for it in bad), bad
    refused(lambda: [client.action("messages:slow", {"ms": 1.0}) for _ in range(20)], "rate")
    soon("the others are there", lambda: len(seen.last()) == good)
    soon("it goes on", lambda: quietly(lambda: client.mutation("messages:send", {"channel": c, "body": "later"})))
    soon("and is live", lambda: len(seen.last()) > good)
    try:
        for _ in range(50):
            http(token(org)).query("messages:list", {"channel": c})
        raise AssertionError("none was refused")
    except Exception as error:
        assert "QuotaExceeded" in str(error), error


@case
def writes_under_way_are_counted():
    org = organisation()
    clients = [socket(token(org)) for _ in range(9)]
    answers = []
    threads = [threading.Thread(target=lambda it=it: answers.append(it.action("messages:slow", {"ms": 2000.0})))
               for it in clients[:8]]
    for thread in threads:
        thread.start()
    time.sleep(1)
    refused(lambda: clients[8].action("messages:slow", {"ms": 1.0}), "in_flight")
    refused(lambda: clients[8].mutation("messages:send", {"channel": "x", "body": "y"}), "in_flight")
    for thread in threads:
        thread.join()
    equal(answers, [2000.0] * 8)
    equal(clients[8].action("messages:slow", {"ms": 1.0}), 1.0)


@case
def a_large_payload_is_refused_alone():
    client = socket(token(organisation()))
    try:
        client.mutation("messages:send", {"channel": "x", "body": "y" * (1 << 20)})
        raise AssertionError("it was let in")
    except ConvexError as error:
        equal(error.data["code"], "payload_too_large")
    client.mutation("messages:send", {"channel": "x", "body": "small"})


@case
def a_suspended_organisation_is_told_and_comes_back():
    org = organisation()
    client = socket(token(org))
    seen = Watch(client, "messages:list", {"channel": "x"})
    soon("the first result", lambda: seen.last() == [])
    write({"_id": org, "tier": "FREE", "status": "suspended", "epoch": 2})
    soon("the refusal", lambda: isinstance(seen.last(), ConvexError))
    equal(seen.last().data["code"], "suspended")
    write({"_id": org, "tier": "FREE", "status": "active", "epoch": 3})
    soon("it lives again", lambda: seen.last() == [], 40)


@case
def a_new_tier_is_felt_on_the_living_socket():
    org = organisation()
    client = socket(token(org))
    seen = [Watch(client, "messages:big", {"channel": "x", "bytes": float(n)}) for n in range(50)]
    soon("fifty", lambda: all(it.last() for it in seen))
    write({"_id": org, "tier": "PRO", "status": "active", "epoch": 2})
    numbers = itertools.count(1000)

    def one_more():
        more = Watch(client, "messages:big", {"channel": "x", "bytes": float(next(numbers))})
        soon("an answer", lambda: more.last())
        return not isinstance(more.last(), ConvexError)

    soon("room", one_more)


main()
