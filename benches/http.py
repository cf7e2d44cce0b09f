#!/usr/bin/env python3
"""The HTTP door beside its peers, in alternating runs on one machine.

- /sql: wrk through dynabase, beside pgbench (extended protocol) straight to the same PostgreSQL and through dynabase's
  Postgres port: what the same statement costs without HTTP.
- A relayed Convex query: wrk straight to nginx with a fixed answer in the place of the deployment, through HAProxy, and
  through dynabase, which verifies, counts, writes the organisation in and changes the token.
- Convex' sync socket: time of one call over it, MB/s of large answers, memory of an idle socket; straight, through
  HAProxy, through dynabase. The deployment is a small stand-in in this file, behind the same nginx for all three.

Every check of dynabase is on; only the tier's rates are lifted. CPU is the proxy's own, user and system.
Usage: benches/http.py [--rounds 3] [--seconds 4] [--sockets 500] [--only hop]. Needs target/release/dynabase (or DYNABASE_BIN), and
haproxy, nginx, wrk (Debian: apt-get install haproxy nginx-light wrk).
"""

import sys

# This folder comes first otherwise, and this file hides Python's own `http`.
sys.path.pop(0)

import argparse
import asyncio
import base64
import glob
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import tempfile
import time
import urllib.request
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
# The sync protocol's first moment.
ZERO = base64.b64encode(bytes(8)).decode()
# One large answer: far beyond every buffer, well within the tier's payload.
LARGE = 1 << 20
SMALL_CALLS, LARGE_CALLS = 1500, 150


def binary():
    path = Path(os.environ.get("DYNABASE_BIN", ROOT / "target/release/dynabase"))
    if not path.exists():
        sys.exit(f"no {path}: cargo build --release, or set DYNABASE_BIN")
    return path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_port(port):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    sys.exit(f"nothing listens on port {port}")


def cpu(pid):
    if not pid:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


# --- The stand-in for a deployment: enough of the sync protocol to answer calls. ---------------------------------------


async def read_frame(reader):
    """One frame: opcode and payload. Nobody here sends continuations."""
    first, second = await reader.readexactly(2)
    length = second & 0x7F
    if length == 126:
        (length,) = struct.unpack(">H", await reader.readexactly(2))
    elif length == 127:
        (length,) = struct.unpack(">Q", await reader.readexactly(8))
    mask = await reader.readexactly(4) if second & 0x80 else None
    payload = await reader.readexactly(length)
    if mask and length:
        key = (mask * (length // 4 + 1))[:length]
        payload = (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(length, "big")
    return first & 0x0F, payload


def frame(opcode, payload, masked):
    length = len(payload)
    head = bytearray([0x80 | opcode])
    flag = 0x80 if masked else 0
    if length < 126:
        head.append(flag | length)
    elif length < 1 << 16:
        head += bytes([flag | 126]) + struct.pack(">H", length)
    else:
        head += bytes([flag | 127]) + struct.pack(">Q", length)
    # A mask of zeros is a mask.
    return bytes(head) + (bytes(4) if masked else b"") + payload


async def deployment(reader, writer):
    head = await reader.readuntil(b"\r\n\r\n")
    key = re.search(rb"(?i)sec-websocket-key: *(\S+)", head)[1]
    accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                 b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n")
    version = {"querySet": 0, "identity": 0, "ts": ZERO}
    large = json.dumps("x" * LARGE)

    def transition(**changes):
        nonlocal version
        start, version = version, {**version, **changes}
        return json.dumps({"type": "Transition", "startVersion": start, "endVersion": version, "modifications": [],
                           "clientClockSkew": None, "serverTs": None})

    def say(text):
        writer.write(frame(1, text.encode(), False))

    try:
        while True:
            opcode, payload = await read_frame(reader)
            if opcode == 8:
                return
            if opcode == 9:
                writer.write(frame(10, payload, False))
            if opcode != 1:
                continue
            message = json.loads(payload)
            match message["type"]:
                case "Authenticate":
                    say(transition(identity=message["baseVersion"] + 1))
                case "ModifyQuerySet":
                    say(transition(querySet=message["newVersion"]))
                case "Action":
                    result = large if message["udfPath"].endswith("large") else "1"
                    say(f'{{"type":"ActionResponse","requestId":{message["requestId"]},"success":true,'
                        f'"result":{result},"logLines":[]}}')
                    say(transition())
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


def run_deployment(port):
    async def serve():
        server = await asyncio.start_server(deployment, "127.0.0.1", port, limit=1 << 22)
        await server.serve_forever()
    asyncio.run(serve())


# --- The client of the sync socket. -----------------------------------------------------------------------------------


class Socket:
    async def open(self, port, token):
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
        self.writer.write(b"GET /api/1.48.0/sync HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\n"
                          b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
                          + base64.b64encode(os.urandom(16)) + b"\r\n\r\n")
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101"), head
        self.request = 0
        self.say({"type": "Connect", "sessionId": str(uuid.uuid4()), "connectionCount": 0, "lastCloseReason": None,
                  "clientTs": 0})
        self.say({"type": "Authenticate", "baseVersion": 0, "tokenType": "User", "value": token})
        self.say({"type": "ModifyQuerySet", "baseVersion": 0, "newVersion": 1, "modifications": []})
        while b'"querySet":1' not in (text := await self.text()).replace(b" ", b""):
            assert b"Error" not in text, text
        return self

    def say(self, message):
        self.writer.write(frame(1, json.dumps(message).encode(), True))

    async def text(self):
        while True:
            opcode, payload = await read_frame(self.reader)
            assert opcode != 8, payload
            if opcode == 9:
                self.writer.write(frame(10, payload, True))
            if opcode == 1:
                return payload

    async def call(self, name):
        self.request += 1
        self.say({"type": "Action", "requestId": self.request, "udfPath": f"bench:{name}", "args": [{}]})
        while not (text := await self.text()).startswith(b'{"type":"ActionResponse"'):
            pass
        assert b'"success":true' in text[:200], text[:300]
        return len(text)


async def over_the_socket(target, token):
    """Median time of a small call, MB/s of large answers, the proxy's CPU seconds for a GB of them."""
    socket_ = await Socket().open(target["port"], token)
    times = []
    for _ in range(SMALL_CALLS):
        began = time.perf_counter()
        await socket_.call("small")
        times.append(time.perf_counter() - began)
    before, began, moved = cpu(target["pid"]), time.perf_counter(), 0
    for _ in range(LARGE_CALLS):
        moved += await socket_.call("large")
    took, spent = time.perf_counter() - began, cpu(target["pid"]) - before
    socket_.writer.close()
    return statistics.median(times) * 1e6, moved / took / 1e6, spent / (moved / 1e9)


async def idle(target, token, count):
    """Bytes of memory for each of many idle sockets."""
    first = [await Socket().open(target["port"], token) for _ in range(20)]
    before = resident(target["pid"])
    sockets = [await Socket().open(target["port"], token) for _ in range(count)]
    await asyncio.sleep(1)
    grown = resident(target["pid"]) - before
    for one in first + sockets:
        one.writer.close()
    await asyncio.sleep(1)
    return grown / count


# --- wrk and pgbench. -------------------------------------------------------------------------------------------------


def wrk(url, script, connections, seconds, pid):
    line = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", script, url]
    before = cpu(pid)
    out = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    spent = cpu(pid) - before
    assert "Non-2xx" not in out, out
    count = int(re.search(r"(\d+) requests in", out)[1])
    unit = {"us": 0.001, "ms": 1.0, "s": 1000.0}

    def latency(share):
        number, word = re.search(rf"{share}%\s+([\d.]+)(us|ms|s)", out).groups()
        return float(number) * unit[word]

    return float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1]), latency(50), latency(99), spent * 1e5 / count


def pgbench(url, script, clients, seconds, pid):
    program = (sorted(glob.glob("/usr/lib/postgresql/*/bin/pgbench")) or [shutil.which("pgbench")])[-1]
    line = [program, "-n", "-M", "extended", "-c", str(clients), "-j", "1", "-T", str(seconds), "-f", script, url]
    before = cpu(pid)
    out = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    spent = cpu(pid) - before
    count = int(re.search(r"actually processed: (\d+)", out)[1])
    if not count:
        sys.exit(f"not one transaction in {seconds} s: give it more\n{out}")
    return float(re.search(r"tps = ([\d.]+)", out)[1]), float(re.search(r"latency average = ([\d.]+)", out)[1]), None, spent * 1e5 / count


def sql(port, url, query):
    body = json.dumps({"query": query}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/sql", body, {"Neon-Connection-String": url})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["rows"]


def medians(runs):
    return [None if None in column else statistics.median(column) for column in zip(*runs)]


def cell(value, form):
    return "–" if value is None else format(value, form)


def alternate(targets, rounds, run):
    runs = {name: [] for name in targets}
    for _ in range(rounds):
        for name in targets:
            runs[name].append(run(name))
    return {name: medians(rows) for name, rows in runs.items()}


NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 8192; }}
http {{
  access_log off; keepalive_requests 100000000;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  map $http_upgrade $connection_upgrade {{ default upgrade; '' close; }}
  server {{
    listen 127.0.0.1:{port}; default_type application/json;
    location = /api/query {{ return 200 '{{"status":"success","value":[{{"author":"a","body":"hello"}}],"logLines":[]}}'; }}
    location / {{
      proxy_pass http://127.0.0.1:{backend}; proxy_http_version 1.1; proxy_read_timeout 600s;
      proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $connection_upgrade;
    }}
  }}
}}
"""
HAPROXY = """
global
  maxconn 4000
  nbthread 2
defaults
  mode http
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  timeout tunnel 600s
  option http-keep-alive
frontend door
  bind 127.0.0.1:{port}
  default_backend deployment
backend deployment
  http-reuse always
  server one 127.0.0.1:{upstream}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--sockets", type=int, default=500)
    parser.add_argument("--only", action="append", choices=["sql", "hop", "socket"], help="this table; all three otherwise")
    parser.add_argument("--port-offset", type=int, default=12000)
    args = parser.parse_args()
    for program in ("haproxy", "nginx", "wrk"):
        if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin"):
            sys.exit(f"{program} is missing: apt-get install haproxy nginx-light wrk")
    os.environ["PATH"] += ":/usr/sbin"
    children = []

    def start(*line, **more):
        child = subprocess.Popen([str(word) for word in line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **more)
        children.append(child)
        return child

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        # nginx' worker may be somebody else.
        os.chmod(folder, 0o755)
        try:
            backend, upstream, middle = free_port(), free_port(), free_port()
            start(sys.executable, __file__, "--as-deployment", backend)
            (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=upstream, backend=backend))
            (folder / "haproxy.cfg").write_text(HAPROXY.format(port=middle, upstream=upstream))
            start("nginx", "-c", folder / "nginx.conf", "-p", folder)
            haproxy = start("haproxy", "-f", folder / "haproxy.cfg")
            ready = folder / "ready.json"
            dynabase = start(binary(), "dev", "--data-dir", folder / "dev", "--port-offset", args.port_offset,
                             "--ready-file", ready, "--convex-url", f"http://127.0.0.1:{upstream}")
            while not ready.exists():
                time.sleep(0.1)
                assert dynabase.poll() is None, "dynabase dev ended"
            for port in (backend, upstream, middle):
                wait_port(port)
            tiers = folder / "dev/tiers.toml"
            text = tiers.read_text()
            head, tail = text.split("[ENTERPRISE]", 1)
            # Rates are counted, and never met.
            tail = re.sub(r"per_(second|minute) = \d+, burst = \d+", r"per_\1 = 40000000, burst = 40000000", tail)
            tiers.write_text(head + "[ENTERPRISE]" + tail)
            dynabase.send_signal(signal.SIGHUP)
            time.sleep(1)
            info = json.loads(ready.read_text())
            tenant = next(it for it in info["tenants"] if it["org_id"] == "umbrella")
            token, door = tenant["token"], info["ports"]["http"]
            home = tenant["urls"]["neon"]
            sql(door, home, "create table rows as select g::int as id, 0 as n, repeat(' ', 84) as filler from generate_series(1, 100000) g")
            sql(door, home, "alter table rows add primary key (id)")
            sql(door, home, "analyze rows")
            database = sql(door, home, "select current_database() as it")[0]["it"]
            direct = info["upstreams"]["postgres"].rsplit("/", 1)[0] + f"/{database}"
            # The Postgres port leads to the main home: the same table there.
            port_url = f"postgres://app:{token}@127.0.0.1:{info['ports']['postgres']}/app"
            subprocess.run(["psql", "-qX", port_url, "-c", "create table rows as select g::int as id, 0 as n, repeat(' ', 84) as filler from generate_series(1, 100000) g",
                            "-c", "alter table rows add primary key (id)", "-c", "analyze rows"], check=True)
            (folder / "row.pgbench").write_text("\\set id random(1, 100000)\nselect n from rows where id = :id;\n")
            (folder / "row.lua").write_text(
                'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n'
                f'wrk.headers["Neon-Connection-String"] = "{home}"\n'
                'request = function()\n  return wrk.format(nil, "/sql", nil, \'{"query":"select n from rows where id = $1","params":["\' .. math.random(100000) .. \'"]}\')\nend\n')
            (folder / "query.lua").write_text(
                'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n'
                f'wrk.headers["Authorization"] = "Bearer {token}"\nwrk.headers["Convex-Client"] = "npm-1.48.0"\n'
                'wrk.path = "/api/query"\n'
                'wrk.body = \'{"path":"messages:list","format":"convex_encoded_json","args":[{"channel":"general"}]}\'\n')

            wanted = args.only or ["sql", "hop", "socket"]
            if "sql" in wanted:
                print("## SQL over HTTP: one row by its key\n")
                print("| connections | through | requests/s | p50 ms | p99 ms | dynabase CPU s per 100 000 |")
                print("|---|---|---|---|---|---|")
                for clients in (1, 16, 64):
                    def one(name):
                        if name.startswith("/sql"):
                            return wrk(f"http://127.0.0.1:{door}", folder / "row.lua", clients, args.seconds, dynabase.pid)
                        url, pid = (direct, 0) if name.startswith("direct") else (port_url, dynabase.pid)
                        return pgbench(url, folder / "row.pgbench", clients, args.seconds, pid)
                    names = ["direct, pgbench (average for p50)", "Postgres port, pgbench", "/sql, wrk"]
                    for name, (rate, p50, p99, spent) in alternate(names, args.rounds, one).items():
                        own = None if name.startswith("direct") else spent
                        print(f"| {clients} | {name} | {rate:,.0f} | {p50:.3f} | {cell(p99, '.3f')} | {cell(own, '.2f')} |", flush=True)

            targets = {"direct": {"port": upstream, "pid": 0}, "HAProxy": {"port": middle, "pid": haproxy.pid},
                       "dynabase": {"port": door, "pid": dynabase.pid}}
            if "hop" in wanted:
                print("\n## A relayed Convex query\n")
                print("| connections | through | requests/s | p50 ms | p99 ms | proxy CPU s per million | CPU × HAProxy |")
                print("|---|---|---|---|---|---|---|")
                for clients in (1, 64):
                    def hop(name):
                        target = targets[name]
                        return wrk(f"http://127.0.0.1:{target['port']}", folder / "query.lua", clients, args.seconds, target["pid"])
                    found = alternate(targets, args.rounds, hop)
                    peer = found["HAProxy"][3]
                    for name, (rate, p50, p99, spent) in found.items():
                        own = "– | –" if name == "direct" else f"{spent * 10:.1f} | {spent / peer:.2f}"
                        print(f"| {clients} | {name} | {rate:,.0f} | {p50:.3f} | {p99:.3f} | {own} |", flush=True)

            if "socket" in wanted:
                print("\n## Convex' sync socket\n")
                print("| through | a small call, µs | 1 MiB answers, MB/s | proxy CPU s per GB | an idle socket, KiB |")
                print("|---|---|---|---|---|")
                found = alternate(targets, args.rounds, lambda name: asyncio.run(over_the_socket(targets[name], token)))
                for name, (micros, speed, spent) in found.items():
                    target = targets[name]
                    memory = asyncio.run(idle(target, token, args.sockets)) / 1024 if target["pid"] else None
                    print(f"| {name} | {micros:.0f} | {speed:.0f} | {cell(spent if target['pid'] else None, '.2f')} | {cell(memory, '.1f')} |", flush=True)
        finally:
            for child in reversed(children):
                child.send_signal(signal.SIGTERM)
                child.wait()


if len(sys.argv) == 3 and sys.argv[1] == "--as-deployment":
    # In its own process: what it costs is not the client's.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    run_deployment(int(sys.argv[2]))
else:
    main()
