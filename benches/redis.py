#!/usr/bin/env python3
"""Redis: direct, through dynabase, through twemproxy (Debian's nutcracker), in alternating runs with redis-benchmark.

Prints a table of medians: throughput, p50 and p99 latency, the proxy's CPU seconds per million commands (user + system)
and Redis' own. Usage: benches/redis.py [--rounds 3] [--requests 300000] [--cases N]. Needs target/release/dynabase, or
another --program.
"""

import argparse
import csv
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TICKS = os.sysconf("SC_CLK_TCK")
# (name, clients, pipeline, bytes, share of the requests, commands)
CASES = [
    ("64 B, 50 clients", 50, 1, 64, 1.0),
    ("64 B, 50 clients, pipeline 16", 50, 16, 64, 4.0),
    ("64 B, 1 client", 1, 1, 64, 0.2),
    ("64 B, 1 000 clients", 1000, 1, 64, 1.0),
    ("64 KiB, 50 clients", 50, 1, 65536, 0.1),
    ("4 MiB, 10 clients", 10, 1, 4 << 20, 0.002),
]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def cpu(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def wait_port(port):
    while True:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)


def run(command, proxy, redis, args, case):
    _, clients, pipeline, size, share = case
    requests = int(args.requests * share)
    line = ["redis-benchmark", "--csv", "-n", str(requests), "-c", str(clients), "-P", str(pipeline), "-d", str(size)]
    line += ["-r", "100000" if size < 1000 else "500" if size < 1 << 20 else "20", "-t", command, *proxy["args"]]
    before = cpu(proxy["pid"]) if proxy["pid"] else 0, cpu(redis)
    out = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    after = cpu(proxy["pid"]) if proxy["pid"] else 0, cpu(redis)
    row = list(csv.DictReader(io.StringIO(out)))[0]
    million = 1e6 / requests
    return (float(row["rps"]), float(row["p50_latency_ms"]), float(row["p99_latency_ms"]),
            (after[0] - before[0]) * million, (after[1] - before[1]) * million)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=300_000)
    parser.add_argument("--cases", type=int, default=len(CASES), help="the first so many cases only")
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/dynabase")
    parser.add_argument("--port-offset", default="11000")
    args = parser.parse_args()
    children = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        try:
            ready = folder / "ready.json"
            dynabase = subprocess.Popen(
                [args.program, "dev", "--data-dir", folder / "dev", "--port-offset", args.port_offset,
                 "--ready-file", ready], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            children.append(dynabase)
            while not ready.exists():
                time.sleep(0.1)
                assert dynabase.poll() is None, "dynabase dev ended"
            tiers = folder / "dev/tiers.toml"
            # The rate is counted, and never met.
            tiers.write_text(tiers.read_text().replace("per_second = 200000, burst = 400000",
                                                       "per_second = 4000000, burst = 8000000"))
            dynabase.send_signal(signal.SIGHUP)
            info = json.loads(ready.read_text())
            upstream = info["upstreams"]["redis"]
            redis_port = int(upstream.rsplit(":", 1)[1].split("/")[0])
            password = upstream.split("@")[0].rsplit(":", 1)[1]
            redis = next(int(pid) for pid in os.listdir("/proc") if pid.isdigit()
                         and f"127.0.0.1:{redis_port}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes())
            url = next(t for t in info["tenants"] if t["org_id"] == "umbrella")["urls"]["redis"]
            # The same server for all three, without its log: it would measure the disk.
            subprocess.run(["redis-cli", "-p", str(redis_port), "-a", password, "--no-auth-warning", "CONFIG", "SET", "appendonly", "no"], check=True,
                           stdout=subprocess.DEVNULL)
            token = url.split("app:")[1].split("@")[0]
            port = free_port()
            config = folder / "nutcracker.yml"
            config.write_text(f"bench:\n  listen: 127.0.0.1:{port}\n  redis: true\n  redis_auth: {password}\n"
                              f"  servers:\n   - 127.0.0.1:{redis_port}:1\n")
            twemproxy = subprocess.Popen(["nutcracker", "-c", config, "-s", str(free_port())], stderr=subprocess.DEVNULL)
            children.append(twemproxy)
            wait_port(port)
            targets = {
                "direct": {"pid": 0, "args": ["-p", str(redis_port), "-a", password]},
                "dynabase": {"pid": dynabase.pid,
                             "args": ["-p", str(info["ports"]["redis"]), "--user", "app", "-a", token]},
                "twemproxy": {"pid": twemproxy.pid, "args": ["-p", str(port), "-a", password]},
            }
            print("| case | command | through | commands/s | p50 ms | p99 ms | proxy CPU s/M | Redis CPU s/M |")
            print("|---|---|---|---|---|---|---|---|")
            for case in CASES[:args.cases]:
                for command in ("set", "get"):
                    runs = {name: [] for name in targets}
                    for _ in range(args.rounds):
                        for name, target in targets.items():
                            runs[name].append(run(command, target, redis, args, case))
                    for name, rows in runs.items():
                        rps, p50, p99, proxy, server = (statistics.median(column) for column in zip(*rows))
                        print(f"| {case[0]} | {command.upper()} | {name} | {rps:,.0f} | {p50:.3f} | {p99:.3f} | "
                              f"{proxy:.2f} | {server:.2f} |", flush=True)
        finally:
            for child in reversed(children):
                child.send_signal(signal.SIGTERM)
                child.wait()


main()
