#!/usr/bin/env python3
"""Postgres through dynabase, through PgBouncer, and direct: alternating runs, medians, the proxy's own CPU.

    benches/postgres.py                    everything, about 40 minutes; writes the table into benches/RESULTS.md
    benches/postgres.py --quick            one short round, prints only
    benches/postgres.py --only pgbench     of: pgbench connect idle large

Needs PostgreSQL with pgbench, pgbouncer, and target/release/dynabase (cargo build --release); without the last one
PgBouncer is measured alone. CPU is user and system time of the proxy's processes around the run.
"""

import argparse
import datetime
import json
import os
import pwd
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches/RESULTS.md"
TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
MODES, CLIENTS = ["simple", "extended", "prepared"], [1, 16, 64]
IDLE_CLIENTS = 2000
START_SECONDS = 120


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]




class Process:
    """A proxy's or server's process, which ends with this script."""

    def __init__(self, command, log, user=None, env=None):
        self.log = log
        with open(log, "wb") as out:
            self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd="/", env=env,
                                          start_new_session=True, **(user or {}))
        self.pid = self.child.pid

    def cpu_seconds(self):
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def rss_bytes(self):
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * PAGE

    def stop(self):
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGINT)
            try:
                self.child.wait(15)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.child.wait()


class Target:
    """Something that answers as a PostgreSQL: where, as whom, and whose CPU to count."""

    def __init__(self, name, env, process=None):
        self.name, self.process = name, process
        self.env = {**os.environ, "PGSSLMODE": "disable", "PGCONNECT_TIMEOUT": "20", **env}

    def pgbench(self, *words, check=True):
        before = self.process.cpu_seconds() if self.process else 0.0
        done = subprocess.run(["pgbench", "-n", *words], env=self.env, capture_output=True, text=True)
        cpu = (self.process.cpu_seconds() if self.process else 0.0) - before
        if done.returncode != 0:
            if check:
                sys.exit(f"pgbench through {self.name}: {done.stderr[-1000:]}")
            return None
        number = lambda pattern: float(re.search(pattern, done.stdout).group(1))
        count = number(r"actually processed: (\d+)")
        return {"tps": number(r"tps = ([\d.]+)"), "ms": number(r"latency average = ([\d.]+)"),
                "cpu": cpu * 100_000 / count, "count": count}


def ready(env, process):
    deadline = time.monotonic() + START_SECONDS
    while subprocess.run(["psql", "-XAtqc", "SELECT 1"], env=env, capture_output=True).returncode != 0:
        if process.child.poll() is not None or time.monotonic() > deadline:
            sys.exit(Path(process.log).read_text(errors="replace")[-3000:])
        time.sleep(0.1)


def unprivileged():
    if os.geteuid() != 0:
        return None, {}
    owner = next(u for u in pwd.getpwall() if u.pw_name in ("postgres", "nobody"))
    return owner, {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}


def start_postgres(folder):
    bin_ = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parent.name))[-1]
    owner, user = unprivileged()
    data, port = folder / "pg", free_port()
    data.mkdir()
    if owner:
        os.chown(data, owner.pw_uid, owner.pw_gid)
    (folder / "password").write_text("bench")
    os.chmod(folder / "password", 0o644)
    subprocess.run([bin_ / "initdb", "-D", data, "-U", "bench", "-A", "scram-sha-256", "--pwfile", folder / "password",
                    "-N"], check=True, stdout=subprocess.DEVNULL, cwd="/", **user)
    settings = {"port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off",
                "shared_buffers": "256MB", "max_connections": 300, "jit": "off", "autovacuum": "off"}
    options = [w for k, v in settings.items() for w in ("-c", f"{k}={v}")]
    process = Process([bin_ / "postgres", "-D", data, *options], folder / "pg.log", user)
    env = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "bench", "PGPASSWORD": "bench", "PGDATABASE": "postgres"}
    target = Target("direct", env)
    ready(target.env, process)
    subprocess.run(["createdb", "bench"], env=target.env, check=True)
    target.env["PGDATABASE"] = "bench"
    subprocess.run(["pgbench", "-iq", "-s", "10"], env=target.env, check=True, capture_output=True)
    return target, process


def start_pgbouncer(folder, postgres):
    version = subprocess.run(["/usr/sbin/pgbouncer", "--version"], capture_output=True, text=True).stdout.split()[1]
    port = free_port()
    prepared = "max_prepared_statements = 200" if tuple(map(int, version.split(".")[:2])) >= (1, 21) else ""
    (folder / "users.txt").write_text('"bench" "bench"\n')
    config = folder / "pgbouncer.ini"
    config.write_text(f"""[databases]
bench = host=127.0.0.1 port={postgres.env["PGPORT"]} dbname=bench
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = plain
auth_file = {folder}/users.txt
pool_mode = transaction
max_client_conn = 5000
default_pool_size = 100
ignore_startup_parameters = extra_float_digits,options
log_connections = 0
log_disconnections = 0
{prepared}
""")
    for path in (config, folder / "users.txt"):
        os.chmod(path, 0o644)
    _, user = unprivileged()
    process = Process(["/usr/sbin/pgbouncer", config], folder / "pgbouncer.log", user)
    env = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "bench", "PGPASSWORD": "bench", "PGDATABASE": "bench"}
    target = Target(f"PgBouncer {version}", env, process)
    target.no_prepared = not prepared
    ready(target.env, process)
    return target


def start_dynabase(folder, workers, postgres):
    """`dynabase serve` before the same PostgreSQL. Every check is on; only the tier's rate and sockets are lifted."""
    binary = os.environ.get("DYNABASE_BIN", str(ROOT / "target/release/dynabase"))
    if not Path(binary).exists():
        return None
    folder = folder / f"dynabase{workers}"
    (folder / "catalog").mkdir(parents=True)
    tiers = (ROOT / "config/tiers.toml").read_text()
    (folder / "tiers.toml").write_text(tiers.replace("per_second = 20000, burst = 40000", "per_second = 10000000, burst = 20000000")
                                       .replace("client_sockets = 1000", "client_sockets = 4000"))
    port, admin, config = free_port(), free_port(), folder / "dynabase.toml"
    upstream = "postgres://bench:bench@127.0.0.1:{PGPORT}/postgres".format(**postgres.env)
    config.write_text(f"""
[listen]
postgres = "127.0.0.1:{port}"
[identity]
issuer = "https://bench.invalid/auth/v1"
hs256_secret = "{os.urandom(32).hex()}"
[catalog]
path = "catalog"
[names]
root_secret = "{os.urandom(32).hex()}"
[upstream.postgres]
url = "{upstream}"
max_connections = 200
[admin]
listen = "127.0.0.1:{admin}"
token = "{os.urandom(16).hex()}"
[runtime]
workers = {workers}
[log]
filter = "warn"
""")
    org = f"bench{workers}"
    command = lambda *words: subprocess.run([binary, *words, "--config", config], check=True, capture_output=True, text=True)
    command("tenant", "create", org, "--tier", "ENTERPRISE")
    token = command("token", "--org", org, "--ttl", "12h").stdout.strip()
    process = Process([binary, "serve", "--config", config], folder / "log")
    env = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "app", "PGPASSWORD": token, "PGDATABASE": "app"}
    target = Target(f"dynabase, {workers} worker{'s' if workers > 1 else ''}", env, process)
    ready(target.env, process)
    subprocess.run(["pgbench", "-iq", "-s", "10"], env=target.env, check=True, capture_output=True)
    return target


def median(values):
    return statistics.median(values)


def bench_pgbench(targets, rounds, seconds):
    rows = []
    for mode in MODES:
        for clients in CLIENTS:
            seen = {t.name: [] for t in targets}
            for number in range(rounds):
                # Alternating, and turned round each time: neighbours on this machine disturb all alike.
                for target in targets if number % 2 == 0 else reversed(targets):
                    if mode == "prepared" and getattr(target, "no_prepared", False):
                        continue
                    words = ["-S", "-M", mode, "-c", str(clients), "-j", str(min(clients, 2)), "-T", str(seconds)]
                    seen[target.name].append(target.pgbench(*words))
            peer = next((name for name in seen if name.startswith("PgBouncer")), None)
            for name, runs in seen.items():
                if not runs:
                    rows.append([mode, clients, name, "–", "–", "–", "–"])
                    continue
                proxied = name != "direct"
                ratio = "–"
                if proxied and peer and seen[peer]:
                    ratio = f"{median([a['cpu'] / b['cpu'] for a, b in zip(runs, seen[peer]) if b['cpu']]):.2f}"
                rows.append([mode, clients, name, f"{median([r['tps'] for r in runs]):.0f}",
                             f"{median([r['ms'] for r in runs]):.3f}",
                             f"{median([r['cpu'] for r in runs]):.2f}" if proxied else "–", ratio])
                print(*rows[-1], sep=" | ", flush=True)
    head = ["mode", "clients", "through", "transactions/s", "latency ms", "proxy CPU s per 100 000", "CPU × PgBouncer"]
    return "pgbench -S, scale 10", head, rows


def bench_connect(targets, rounds, seconds):
    rows = []
    for target in targets:
        runs = [target.pgbench("-S", "-C", "-c", "8", "-j", "2", "-T", str(seconds)) for _ in range(rounds)]
        cpu = f"{median([r['cpu'] for r in runs]) * 10:.0f}" if target.process else "–"
        rows.append([target.name, f"{median([r['tps'] for r in runs]):.0f}", cpu])
        print(*rows[-1], sep=" | ", flush=True)
    return "A connection per transaction (pgbench -C, 8 clients)", ["through", "connections/s", "proxy CPU µs each"], rows


def idle_client(env):
    """Logs in with a cleartext password and leaves the socket open. libpq would cost this script 100 KB each."""
    sock = socket.create_connection((env["PGHOST"], int(env["PGPORT"])), timeout=20)
    body = b"\0\3\0\0" + b"".join(w.encode() + b"\0" for w in ("user", env["PGUSER"], "database", env["PGDATABASE"])) + b"\0"
    sock.sendall((len(body) + 4).to_bytes(4, "big") + body)
    buffer, sent = b"", False
    while True:
        while len(buffer) >= 5 and len(buffer) >= 1 + int.from_bytes(buffer[1:5], "big"):
            size = 1 + int.from_bytes(buffer[1:5], "big")
            message, buffer = buffer[:size], buffer[size:]
            if message[:1] == b"E":
                raise RuntimeError(message[5:].replace(b"\0", b" ").decode(errors="replace"))
            if message[:1] == b"Z":
                return sock
            if message[:1] == b"R" and not sent and message[5:9] == b"\0\0\0\3":
                password = env["PGPASSWORD"].encode() + b"\0"
                sock.sendall(b"p" + (len(password) + 4).to_bytes(4, "big") + password)
                sent = True
        data = sock.recv(65536)
        if not data:
            raise RuntimeError("closed during login")
        buffer += data


def bench_idle(targets, *_):
    rows = []
    for target in targets:
        if target.process is None:
            continue
        before, clients, why = target.process.rss_bytes(), [], ""
        try:
            while len(clients) < IDLE_CLIENTS:
                clients.append(idle_client(target.env))
        except (RuntimeError, OSError) as error:
            why = f" ({error})"
        time.sleep(2)
        held = target.process.rss_bytes()
        count = len(clients)
        for sock in clients:
            sock.close()
        time.sleep(30)
        after = target.process.rss_bytes()
        back = f"{100 * (held - after) / (held - before):.0f} %" if held > before else "–"
        rows.append([target.name, f"{count}{why}", f"{(held - before) / max(count, 1) / 1024:.1f}", back])
        print(*rows[-1], sep=" | ", flush=True)
    return "Idle authenticated clients, plain", ["through", "clients", "KiB each", "given back 30 s after they left"], rows


def bench_large(targets, rounds, _):
    rows = []
    # 1 GiB in rows of 1 KiB.
    query = "COPY (SELECT repeat('x', 1023) FROM generate_series(1, 1048576)) TO STDOUT"
    select = "SELECT repeat('x', 1023) FROM generate_series(1, 1048576)"
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write(select + ";\n")
        script.flush()
        for target in targets:
            for kind in ["COPY", "SELECT"]:
                rate, cpu = [], []
                for _ in range(max(1, rounds // 2)):
                    start = time.monotonic()
                    before = target.process.cpu_seconds() if target.process else 0
                    if kind == "COPY":
                        subprocess.run(["psql", "-XAtqc", query], env=target.env, stdout=subprocess.DEVNULL, check=True)
                    else:
                        target.pgbench("-f", script.name, "-t", "1", "-c", "1")
                    used = (target.process.cpu_seconds() if target.process else 0) - before
                    rate.append(1024 / (time.monotonic() - start))
                    cpu.append(used)
                rows.append([target.name, kind, f"{median(rate):.0f}", f"{median(cpu):.2f}" if target.process else "–"])
                print(*rows[-1], sep=" | ", flush=True)
    return "One client, 1 GiB of rows", ["through", "by", "MiB/s", "proxy CPU s per GiB"], rows


BENCHES = {"pgbench": bench_pgbench, "connect": bench_connect, "idle": bench_idle, "large": bench_large}


def machine():
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    postgres = subprocess.run(["pgbench", "--version"], capture_output=True, text=True).stdout.strip()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return f"{date} · {os.cpu_count()} cores of {model} · Linux {os.uname().release} · {postgres} · commit {commit}"


def write(sections, note):
    """Replaces the part of the results between its two marks; what other benchmarks wrote stays."""
    begin, end = "<!-- postgres -->", "<!-- /postgres -->"
    text = [begin, "## Postgres", "", note, "Client, proxy and database on one machine; alternating runs, medians; the CPU "
            "is the proxy's own, user and system. Ratios are taken within a round.", ""]
    for title, head, rows in sections:
        text += [f"### {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        text += ["| " + " | ".join(map(str, row)) + " |" for row in rows] + [""]
    part = "\n".join([*text, end])
    old = RESULTS.read_text() if RESULTS.exists() else "# Results\n\n"
    if begin in old:
        new = old[:old.index(begin)] + part + old[old.index(end) + len(end):]
    else:
        new = old.rstrip() + "\n\n" + part + "\n"
    RESULTS.write_text(new)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", action="append", choices=list(BENCHES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=8)
    args = parser.parse_args()
    rounds, seconds = (1, 2) if args.quick else (args.rounds, args.seconds)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    folder = Path(tempfile.mkdtemp(prefix="dynabase-bench-"))
    os.chmod(folder, 0o755)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = []
    try:
        direct, server = start_postgres(folder)
        started.append(server)
        targets = [direct, start_pgbouncer(folder, direct)]
        started.append(targets[1].process)
        for workers in [1, 2]:
            target = start_dynabase(folder, workers, direct)
            if target is None:
                print("no dynabase: cargo build --release")
                break
            started.append(target.process)
            targets.append(target)
        sections = [BENCHES[name](targets, rounds, seconds) for name in args.only or BENCHES]
        if not args.quick and not args.only:
            write(sections, machine() + f" · {rounds} rounds of {seconds} s")
            print(f"written to {RESULTS.relative_to(ROOT)}")
    finally:
        for process in reversed(started):
            process.stop()
        shutil.rmtree(folder, ignore_errors=True)


main()
