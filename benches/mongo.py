#!/usr/bin/env python3
"""MongoDB: direct, through dynabase as a tenant of `filter` isolation, and of `database`, in alternating runs.

The load is the Rust driver (benches/load/mongo.rs). Prints a table of medians: operations per second, p50 and p99
latency and what the proxy adds to them, the proxy's CPU seconds per 100 000 operations (user + system), the server's.
Usage: benches/mongo.py [--rounds 3] [--operations 20000] [--cases find,insert,aggregate] [--clients 1,16,64]
Needs target/release/dynabase and target/release/examples/mongo_load (`make bench-mongo` builds both).
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TICKS = os.sysconf("SC_CLK_TCK")
# Some cases are heavier at the server.
SHARE = {"find": 1.0, "insert": 1.0, "aggregate": 0.3}
# One client alone is slower than several together.
ALONE = 0.25


def cpu(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def process_on(port):
    """The process whose command line names a port of this machine."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(port).encode() in words and any(b"secantusd" in word or b"mongod" in word for word in words):
            return int(pid)
    raise SystemExit(f"no server's process is found that listens on {port}")


def unlimited(text):
    """Both tiers alike, counted and never met: what is measured is the way, not the limit."""
    def section(found):
        body = re.sub(r"^connections = \d+", "connections = 100", found[0], flags=re.M)
        body = re.sub(r"^client_sockets = \d+", "client_sockets = 1000", body, flags=re.M)
        return re.sub(r"per_second = \d+, burst = \d+", "per_second = 4000000, burst = 8000000", body)
    return re.sub(r"^\[(STARTER|ENTERPRISE)\.mongodb\]\n(?:.+\n)+", section, text, flags=re.M)


def run(load, target, server, case, clients, operations):
    before = cpu(target["pid"]) if target["pid"] else 0, cpu(server)
    out = subprocess.run([load, target["url"], case, str(clients), str(operations)], capture_output=True, text=True)
    if out.returncode:
        raise SystemExit(f"{case}: {out.stderr[-500:]}")
    after = cpu(target["pid"]) if target["pid"] else 0, cpu(server)
    told = json.loads(out.stdout)
    if told["errors"]:
        raise SystemExit(f"{case} with {clients} clients: {told['errors']} errors")
    # The preparation's requests are in it: a handful, and one per client.
    each = 100_000 / told["operations"]
    return (told["operations"] / told["seconds"], told["p50_us"] / 1000, told["p99_us"] / 1000,
            (after[0] - before[0]) * each, (after[1] - before[1]) * each)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--operations", type=int, default=20_000)
    parser.add_argument("--cases", default="find,insert,aggregate")
    parser.add_argument("--clients", default="1,16,64")
    parser.add_argument("--port-offset", default="12000")
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/dynabase")
    parser.add_argument("--load", type=Path, default=ROOT / "target/release/examples/mongo_load")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        ready = folder / "ready.json"
        dynabase = subprocess.Popen(
            [args.program, "dev", "--data-dir", folder / "dev", "--port-offset", args.port_offset,
             "--ready-file", ready], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not ready.exists():
                time.sleep(0.1)
                assert dynabase.poll() is None, "dynabase dev ended"
            tiers = folder / "dev/tiers.toml"
            tiers.write_text(unlimited(tiers.read_text()))
            dynabase.send_signal(signal.SIGHUP)
            time.sleep(1)
            info = json.loads(ready.read_text())
            upstream = info["upstreams"]["mongodb"]
            server = process_on(int(re.search(r":(\d+)/", upstream.split("@")[-1])[1]))
            of = {t["org_id"]: re.sub(r"&maxPoolSize=\d+", "", t["urls"]["mongodb"]) for t in info["tenants"]}
            targets = {
                "direct": {"pid": 0, "url": upstream},
                "dynabase, filter": {"pid": dynabase.pid, "url": of["globex"]},
                "dynabase, database": {"pid": dynabase.pid, "url": of["umbrella"]},
            }
            print("| case | clients | through | operations/s | p50 ms | p99 ms | added p50 ms | added p99 ms | "
                  "proxy CPU s/100k | server CPU s/100k |")
            print("|---|---|---|---|---|---|---|---|---|---|")
            for case in args.cases.split(","):
                for clients in map(int, args.clients.split(",")):
                    operations = int(args.operations * SHARE[case] * (ALONE if clients == 1 else 1))
                    runs = {name: [] for name in targets}
                    for _ in range(args.rounds):
                        for name, target in targets.items():
                            runs[name].append(run(args.load, target, server, case, clients, operations))
                    medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in runs.items()}
                    for name, (rate, p50, p99, proxy, at_server) in medians.items():
                        added = [f"{value - medians['direct'][column]:.3f}" if name != "direct" else ""
                                 for column, value in ((1, p50), (2, p99))]
                        print(f"| {case} | {clients} | {name} | {rate:,.0f} | {p50:.3f} | {p99:.3f} | {added[0]} | {added[1]} | "
                              f"{proxy:.2f} | {at_server:.2f} |", flush=True)
        finally:
            dynabase.send_signal(signal.SIGTERM)
            dynabase.wait()


main()
