"""convex from PyPI before the proxy: its HTTP client and its socket client, each refusal, and JS at the other end.

The client holds Python's lock while it waits, in `next(subscription)` and in calls: no other thread runs meanwhile, and
no signal is heard. So everything here is one thread, which asks only for what has to come, under `timeout`.
"""

import base64
import hashlib
import hmac
import itertools
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import pymongo
from convex import ConvexClient, ConvexError
from convex.http_client import ConvexHttpClient
from harness import READY, case, equal, main, tenant

if "CONVEX_SUITE" not in os.environ:
    here = [sys.executable, *sys.argv]
    sys.exit(subprocess.call(["timeout", "-s", "KILL", "240", *here], env={**os.environ, "CONVEX_SUITE": "1"}))

BASE = READY["tenants"][0]["urls"]["convex"]
# Where tests/drivers/run lets `dynabase dev` live: beside the ready file.
HOME = Path(sys.argv[1]).parent / "data"
NODE = Path(__file__).parent / "node"
_numbers = itertools.count(1)


USER = "8dc8a8bb-13ec-48d9-a321-785d7178358a"


def token(org, seconds=3600):
    """A token of the development issuer."""
    toml = (HOME / "dynabase.toml").read_text()
    secret = re.search(r'^hs256_secret = "(.*)"$', toml, re.M)[1]
    issuer = re.search(r'^issuer = "(.*)"$', toml, re.M)[1]
    now = int(time.time())
    claims = {"iss": issuer, "aud": "authenticated", "sub": USER, "session_id": USER, "role": "authenticated", "iat": now,
              "exp": now + seconds, "org_id": org}

    def part(data):
        return base64.urlsafe_b64encode(data).rstrip(b"=")

    signed = part(json.dumps({"alg": "HS256", "typ": "JWT"}).encode()) + b"." + part(json.dumps(claims).encode())
    return (signed + b"." + part(hmac.new(secret.encode(), signed, hashlib.sha256).digest())).decode()


def write(record):
    """What an operator does by hand: the record is replaced, straight on the catalog."""
    with pymongo.MongoClient(READY["catalog"]["url"]) as client:
        client[READY["catalog"]["database"]].orgs.replace_one({"_id": record["_id"]}, record, upsert=True)


def organisation(tier="FREE"):
    """One for a case alone, so that cases don't use up each other's limits."""
    org = f"py{os.getpid()}n{next(_numbers)}"
    write({"_id": org, "tier": tier, "status": "active", "epoch": 1})
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
    """A subscription and what it was told last. A failed query is an answer too."""

    def __init__(self, client, name, args):
        self.subscription = client.subscribe(name, args)
        self.last = self.next()

    def next(self):
        try:
            self.last = next(self.subscription)
        except ConvexError as error:
            self.last = error
        return self.last

    def until(self, wanted):
        for _ in range(200):
            if wanted(self.last):
                return self.last
            self.next()
        raise AssertionError(f"not among 200 results, last: {self.last}")

    def refused(self):
        return isinstance(self.last, ConvexError)


JS = """
const { ConvexClient } = require('convex/browser');
const { makeFunctionReference: ref } = require('convex/server');
const [, url, token, ...rest] = process.argv;
const client = new ConvexClient(url, { skipConvexDeploymentUrlCheck: true, expectAuth: true });
client.setAuth(async () => token);
"""


def javascript(script, *args, **more):
    return subprocess.Popen(["node", "-e", JS + script, BASE, *args], cwd=NODE, stdout=subprocess.PIPE, text=True, **more)


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
    # umbrella and initech share a deployment; acme has its own.
    for org, other in [("umbrella", "initech"), ("acme", "umbrella")]:
        c = channel()
        here, elsewhere = socket(tenant(org)["token"]), socket(tenant(other)["token"])
        seen, foreign = (Watch(it, "messages:list", {"channel": c}) for it in (here, elsewhere))
        equal((seen.last, foreign.last), ([], []))
        sender = javascript("client.mutation(ref('messages:send'), { channel: rest[0], body: 'from JavaScript' })"
                            ".then(() => process.exit(0));", tenant(org)["token"], c)
        equal(sender.wait(30), 0)
        equal([it["body"] for it in seen.until(lambda it: it != [])], ["from JavaScript"])
        # Its own write comes after whatever the other's could have caused.
        elsewhere.mutation("messages:send", {"channel": c, "body": "mine"})
        equal([it["body"] for it in foreign.until(lambda it: it != [])], ["mine"])


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
    assert not any(it.refused() for it in seen)
    more = Watch(client, "messages:big", {"channel": c, "bytes": 1000.0})
    assert more.refused(), more.last
    equal((more.last.data["limit"], more.last.data["max"]), ("subscriptions", 50))
    client.mutation("messages:send", {"channel": c, "body": "x"})
    for it in seen:
        it.until(lambda result: result["count"] == 1)
    # A new tier is felt on this very socket.
    write({"_id": org, "tier": "PRO", "status": "active", "epoch": 2})
    numbers = itertools.count(2000)
    soon("room", lambda: not Watch(client, "messages:big", {"channel": c, "bytes": float(next(numbers))}).refused())


@case
def calls_over_the_rate_are_refused_one_by_one():
    org, c = organisation(), channel()
    client = socket(token(org))
    seen = Watch(client, "messages:list", {"channel": c})
    equal(seen.last, [])
    # One batch that uses up the burst and 20 seconds more: this client is slower than five calls a second.
    queries = [{"path": "messages:list", "args": {"channel": c}}] * 200
    time.sleep(1)
    request = urllib.request.Request(f"{BASE}/api/query_batch", json.dumps({"queries": queries}).encode(), {
        "authorization": f"Bearer {token(org)}", "content-type": "application/json"})
    equal(urllib.request.urlopen(request).status, 200)
    for _ in range(3):
        error = refused(lambda: client.mutation("messages:send", {"channel": c, "body": "no"}), "rate")
        equal((error.data["max"], error.data["tier"]), (300, "FREE"))
    refused(lambda: client.action("messages:slow", {"ms": 1.0}), "rate")
    refused(lambda: client.query("messages:whoami", {}), "rate")
    try:
        http(token(org)).query("messages:list", {"channel": c})
        raise AssertionError("it was let in")
    except Exception as error:
        assert "QuotaExceeded" in str(error), error
    soon("it goes on", lambda: quietly(lambda: client.mutation("messages:send", {"channel": c, "body": "later"})), 40)
    equal(len(seen.until(lambda it: it != [])), 1)


@case
def writes_under_way_are_counted():
    org = organisation()
    client = socket(token(org))
    client.query("messages:whoami", {})
    busy = javascript("client.query(ref('messages:whoami'), {}).then(() => {"
                      "for (let n = 0; n < 8; n += 1) client.action(ref('messages:slow'), { ms: 4000 })"
                      ".then(() => console.log('done')); setTimeout(() => console.log('busy'), 1000); });", token(org))
    equal(busy.stdout.readline(), "busy\n")
    refused(lambda: client.action("messages:slow", {"ms": 1.0}), "in_flight")
    refused(lambda: client.mutation("messages:send", {"channel": "x", "body": "y"}), "in_flight")
    equal([busy.stdout.readline() for _ in range(8)], ["done\n"] * 8)
    busy.kill()
    equal(client.action("messages:slow", {"ms": 1.0}), 1.0)


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
    equal(seen.last, [])
    write({"_id": org, "tier": "FREE", "status": "suspended", "epoch": 2})
    seen.until(lambda it: isinstance(it, ConvexError))
    equal(seen.last.data["code"], "suspended")
    write({"_id": org, "tier": "FREE", "status": "active", "epoch": 3})
    seen.until(lambda it: it == [])


@case
def sockets_over_the_cap_are_answered_and_come_in_later():
    org = organisation()
    # Each with a subscription of its own: no two share a socket.
    crowd = javascript("""
        const all = [client];
        while (all.length < 25) {
          const one = new ConvexClient(url, { skipConvexDeploymentUrlCheck: true, expectAuth: true });
          one.setAuth(async () => token);
          all.push(one);
        }
        Promise.all(all.map((one) => one.query(ref('messages:whoami'), {}))).then(() => console.log('full'));
        process.stdin.on('data', () => all.slice(0, 3).forEach((one) => one.close()));
    """, token(org), stdin=subprocess.PIPE)
    equal(crowd.stdout.readline(), "full\n")
    client = socket(token(org))
    error = refused(lambda: client.query("messages:whoami", {}), "client_sockets")
    equal(error.data["max"], 25)
    refused(lambda: client.mutation("messages:send", {"channel": "x", "body": "y"}), "client_sockets")
    crowd.stdin.write("go\n")
    crowd.stdin.flush()
    soon("it comes in by itself", lambda: quietly(lambda: client.query("messages:whoami", {})), 40)
    crowd.kill()


@case
def without_a_token_everything_fails():
    client = ConvexClient(BASE)
    for ask in (lambda: client.query("messages:whoami", {}), lambda: client.mutation("messages:send", {"channel": "x", "body": "y"})):
        try:
            ask()
            raise AssertionError("it was let in")
        except ConvexError as error:
            equal(error.data["code"], "unauthenticated")
    # On the same client, once it has one.
    client.set_auth(tenant("umbrella")["token"])
    soon("it comes in", lambda: quietly(lambda: client.query("messages:whoami", {})))


@case
def a_cut_socket_comes_back_with_its_subscriptions():
    org, c = "acme", channel()
    client = socket(tenant(org)["token"])
    seen = Watch(client, "messages:list", {"channel": c})
    equal(seen.last, [])
    convex = READY["convex"]
    for count in (1, 2):
        request = urllib.request.Request(f"{convex['deployments'][org]}/double/drop", b"", {
            "authorization": f"Convex {convex['admin_key']}"})
        equal(urllib.request.urlopen(request).status, 200)
        client.mutation("messages:send", {"channel": c, "body": str(count)})
        seen.until(lambda it, count=count: len(it) >= count)


main()
