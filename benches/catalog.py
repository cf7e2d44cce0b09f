#!/usr/bin/env python3
"""The catalog on MongoDB with a million organisations: memory, start, cold look-up, and time from write to enforcement.

Usage: benches/catalog.py [--orgs 1000000] [--lookups 20000] [--writes 500] [--port-offset 13000]
Needs target/release/dynabase and pymongo (the drivers' virtual environment has it: `make bench-catalog`).
"""

import argparse
import base64
import hashlib
import hmac
import json
import os
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import tempfile
import time
import tomllib
from pathlib import Path

import bson
import pymongo

ROOT = Path(__file__).resolve().parent.parent
BATCH = 5_000


def resident(pid):
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def token(secret, org):
    def part(value):
        return base64.urlsafe_b64encode(json.dumps(value, separators=(",", ":")).encode()).rstrip(b"=")
    now = int(time.time())
    head = part({"alg": "HS256", "typ": "JWT"})
    claims = {"iss": "https://dev.dynabase.invalid/auth/v1", "aud": "authenticated", "exp": now + 86_400, "iat": now,
              "sub": "a74f8ab7-b57c-419c-af25-182174c4bb1e", "role": "authenticated", "aal": "aal1",
              "session_id": "5f459aff-4b49-46dd-a8b4-96f645d32018", "email": "bench@example.org", "phone": "",
              "is_anonymous": False, "amr": [{"method": "password", "timestamp": now}], "app_metadata": {},
              "user_metadata": {}, "org_id": org}
    text = head + b"." + part(claims)
    return (text + b"." + base64.urlsafe_b64encode(hmac.new(secret.encode(), text, hashlib.sha256).digest()).rstrip(b"=")).decode()


class Session:
    """A MongoDB client as bytes: its login asks the catalog, and its socket ends when its tenant is suspended."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def run(self, command):
        body = bson.encode(command)
        self.socket.sendall(struct.pack("<iiiiiB", 21 + len(body), 1, 0, 2013, 0, 0) + body)
        data = b""
        while len(data) < 4 or len(data) < struct.unpack_from("<i", data)[0]:
            more = self.socket.recv(65536)
            if not more:
                raise ConnectionError
            data += more
        return bson.decode(data[21:])

    def log_in(self, token):
        """Gives the milliseconds it took."""
        since = time.perf_counter()
        told = self.run({"saslStart": 1, "mechanism": "PLAIN", "payload": f"\0app\0{token}".encode(), "$db": "$external"})
        took = (time.perf_counter() - since) * 1000
        assert told.get("done"), told
        return took

    def ended(self):
        while self.socket.recv(65536):
            pass

    def close(self):
        self.socket.close()


def shares(values):
    ordered = sorted(values)
    return statistics.median(ordered), ordered[int(len(ordered) * 0.99)]


def start(command, ready):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not ready():
        assert process.poll() is None, "it ended"
        time.sleep(0.002)
    return process


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def own_config(folder, name):
    """The installation's configuration on ports of its own; gives its path and the port for MongoDB clients."""
    text, port = (folder / "dev/dynabase.toml").read_text(), free_port()
    text = re.sub(r'^(postgres|redis|http) = "127.0.0.1:\d+"', lambda m: f'{m[1]} = "127.0.0.1:{free_port()}"', text, flags=re.M)
    text = re.sub(r'^mongodb = "127.0.0.1:\d+"', f'mongodb = "127.0.0.1:{port}"', text, flags=re.M)
    text = re.sub(r'^listen = "127.0.0.1:\d+"', f'listen = "127.0.0.1:{free_port()}"', text, flags=re.M)
    text = text.replace('tiers = "tiers.toml"', f'tiers = "{folder}/dev/tiers.toml"')
    path = folder / name
    path.write_text(text)
    path.chmod(0o600)
    return path, port


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orgs", type=int, default=1_000_000)
    parser.add_argument("--lookups", type=int, default=20_000)
    parser.add_argument("--writes", type=int, default=500)
    parser.add_argument("--port-offset", default="13000")
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/dynabase")
    args = parser.parse_args()
    random.seed(1)
    program = args.program
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        ready = folder / "ready.json"
        dev = start([program, "dev", "--data-dir", folder / "dev", "--port-offset", args.port_offset, "--ready-file", ready],
                    ready.exists)
        children = [dev]
        try:
            url = json.loads(ready.read_text())["upstreams"]["mongodb"]
            secret = tomllib.loads((folder / "dev/dynabase.toml").read_text())["identity"]["hs256_secret"]
            orgs = pymongo.MongoClient(url).dynabase.orgs
            tiers = ["FREE", "FREE", "FREE", "STARTER", "PRO", "ENTERPRISE"]

            def serve(name):
                path, port = own_config(folder, name)
                since = time.perf_counter()
                process = start([program, "serve", "--config", path], lambda: listens(port))
                took = (time.perf_counter() - since) * 1000
                children.append(process)
                return process, port, took

            def stop(process):
                children.remove(process)
                process.terminate()
                process.wait()

            empty, _, _ = serve("empty.toml")
            time.sleep(5)
            before = resident(empty.pid)
            print(f"with 4 organisations: {before:.1f} MiB resident", flush=True)

            since = time.perf_counter()
            for at in range(0, args.orgs, BATCH):
                orgs.insert_many([{"_id": f"org-{n:07}", "tier": tiers[n % 6], "status": "active", "epoch": 1, "generation": 1,
                                   "created_at": time.strftime("%FT%TZ", time.gmtime())}
                                  for n in range(at, min(at + BATCH, args.orgs))], ordered=False,
                                 bypass_document_validation=True)
                if at % 100_000 == 0:
                    print(f"  {at} organisations after {time.perf_counter() - since:.0f} s", flush=True)
            took = time.perf_counter() - since
            print(f"{args.orgs} organisations written in {took:.0f} s ({args.orgs / took:,.0f}/s, the server's pace)", flush=True)
            print(f"the process that followed all of it: {resident(empty.pid):.1f} MiB, {resident(empty.pid) - before:+.1f}", flush=True)
            stop(empty)

            starts = []
            for n in range(5):
                process, port, took = serve(f"start-{n}.toml")
                starts.append(took)
                if n < 4:
                    stop(process)
            print(f"start of serve to accepting: median {statistics.median(starts):.0f} ms of {[round(s) for s in starts]}", flush=True)
            time.sleep(5)
            print(f"started before {args.orgs} organisations: {resident(process.pid):.1f} MiB", flush=True)

            # In numbers that are there, in no order: no cache has them.
            chosen = random.sample(range(args.orgs), min(args.lookups, args.orgs))
            cold, warm, direct = [], [], []
            for n in chosen:
                credential = token(secret, f"org-{n:07}")
                session = Session(port)
                cold.append(session.log_in(credential))
                session.close()
                if len(warm) < 2_000:
                    session = Session(port)
                    warm.append(session.log_in(credential))
                    session.close()
                    since = time.perf_counter()
                    orgs.find_one({"_id": f"org-{n:07}"})
                    direct.append((time.perf_counter() - since) * 1000)
            for what, values in (("login of an organisation never seen", cold), ("login of one that is known", warm),
                                 ("the server's find alone, by pymongo", direct)):
                p50, p99 = shares(values)
                print(f"{what}: p50 {p50:.2f} ms, p99 {p99:.2f} ms ({len(values)})", flush=True)
            print(f"after {len(chosen)} organisations were served: {resident(process.pid):.1f} MiB, "
                  f"{resident(process.pid) - before:+.1f} above empty", flush=True)

            from_write, from_answer = [], []
            for n in random.sample(range(args.orgs), args.writes):
                org = f"org-{n:07}"
                session = Session(port)
                session.log_in(token(secret, org))
                since = time.perf_counter()
                orgs.update_one({"_id": org}, {"$set": {"status": "suspended"}, "$inc": {"epoch": 1}})
                answered = time.perf_counter()
                session.ended()
                over = time.perf_counter()
                from_write.append((over - since) * 1000)
                from_answer.append((over - answered) * 1000)
            for what, values in (("from sending a write to its enforcement", from_write),
                                 ("from the write's answer to its enforcement", from_answer)):
                p50, p99 = shares(values)
                print(f"{what}: p50 {p50:.1f} ms, p99 {p99:.1f} ms, most {max(values):.1f} ms ({len(values)})", flush=True)
        finally:
            for child in reversed(children):
                child.send_signal(signal.SIGTERM)
                child.wait()


main()
