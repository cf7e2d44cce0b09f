"""The limits of a tier, seen from both sides: by clients, and by the administrator behind the proxy."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pymongo
from harness import ADMIN, READY, Raises, case, equal, main, url

FREE = "acme"
CONNECTIONS, SOCKETS, QUEUE_SECONDS, BURST = 5, 50, 5, 100


def connect(org=FREE, **options):
    return psycopg.connect(url(org), connect_timeout=20, autocommit=True, **options)


def physical_database(org=FREE):
    with connect(org) as conn:
        return conn.execute("SELECT current_database()").fetchone()[0]


class Backends:
    """Counts the tenant's client backends in the server, about a hundred times a second."""

    def __init__(self, org=FREE):
        self.database, self.most, self.done = physical_database(org), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self):
        with psycopg.connect(ADMIN, autocommit=True) as admin:
            while not self.done.is_set():
                row = admin.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND backend_type = "
                                    "'client backend' AND query LIKE 'SELECT pg_sleep%%'", (self.database,)).fetchone()
                self.most = max(self.most, row[0])
                self.done.wait(0.01)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


def edit(org, **changes):
    """What an operator does by hand: changes fields of the record, raises its epoch, straight on the catalog."""
    with pymongo.MongoClient(READY["catalog"]["url"]) as client:
        orgs = client[READY["catalog"]["database"]].orgs
        done = orgs.update_one({"_id": org}, {"$set": changes, "$inc": {"epoch": 1}})
        equal(done.matched_count, 1)


def soon(what, seconds, check):
    deadline = time.monotonic() + seconds
    while True:
        try:
            if check():
                return
        except psycopg.Error:
            pass
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)


@case
def six_sleepers_share_what_there_is():
    def sleep(conn):
        start = time.monotonic()
        conn.execute("SELECT pg_sleep(3)")
        return time.monotonic() - start

    clients = [connect() for _ in range(6)]
    with Backends() as backends, ThreadPoolExecutor(6) as threads:
        took = sorted(threads.map(sleep, clients))
    for conn in clients:
        conn.close()
    if READY.get("plain"):
        equal(backends.most, 6)
        return
    equal(backends.most, CONNECTIONS)
    assert took[4] < 4.5, f"five ran at once: {took}"
    assert 5.5 < took[5] < 8, f"the sixth waited for one of them: {took}"


@case(proxied=True)
def a_sixth_session_is_refused_after_the_queue_deadline():
    def session():
        return connect(options="-c dynabase.pool_mode=session")

    held = [session() for _ in range(CONNECTIONS)]
    for conn in held:
        conn.execute("SELECT 1")
    start = time.monotonic()
    with Raises("53300") as raised:
        with session() as sixth:
            sixth.execute("SELECT 1")
    took = time.monotonic() - start
    assert QUEUE_SECONDS - 1 < took < QUEUE_SECONDS + 3, f"after {took:.1f} s"
    assert "5" in str(raised.error), f"it does not say how many: {raised.error}"
    held.pop().close()
    with session() as sixth:
        equal(sixth.execute("SELECT 1").fetchone(), (1,))
    for conn in held:
        conn.close()


@case(proxied=True)
def a_transaction_that_waits_too_long_is_refused_and_the_client_stays():
    held = [connect() for _ in range(CONNECTIONS)]
    for conn in held:
        conn.execute("BEGIN")
    with connect() as late:
        with Raises("53300"):
            late.execute("SELECT 1")
        for conn in held:
            conn.execute("ROLLBACK")
        equal(late.execute("SELECT 1").fetchone(), (1,))
    for conn in held:
        conn.close()


@case(proxied=True)
def the_fifty_first_socket_is_refused():
    clients = []
    try:
        # Those of earlier cases may still be leaving.
        deadline = time.monotonic() + 10
        while len(clients) < SOCKETS:
            try:
                clients.append(connect())
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, f"only {len(clients)} sockets"
                time.sleep(0.1)
        with Raises("53300"):
            connect()
        with connect("globex") as other:
            equal(other.execute("SELECT 1").fetchone(), (1,))
        clients.pop().close()
        soon("a place came back", 5, lambda: clients.append(connect()) is None)
    finally:
        for conn in clients:
            conn.close()


@case(proxied=True)
def a_rate_is_refused_with_a_hint_and_the_session_stays():
    time.sleep(2.5)  # a whole burst has to grow back: this is what the limit counts, so nothing else can be waited for
    with connect() as conn:
        served, refused = 0, None
        for _ in range(3 * BURST):
            try:
                conn.execute("SELECT 1")
                served += 1
            except psycopg.Error as error:
                refused = error
                break
        assert refused is not None, f"{served} statements at once"
        equal(refused.sqlstate, "53400")
        assert "retry_after_ms" in (refused.diag.message_detail or ""), refused.diag.message_detail
        assert served >= BURST * 0.9, f"only {served}"
        soon("the rate recovers", 3, lambda: conn.execute("SELECT 1").fetchone() == (1,))


@case(proxied=True)
def a_rate_is_not_refused_inside_a_transaction():
    with connect() as conn:
        soon("the rate recovers", 3, lambda: conn.execute("BEGIN") is not None)
        for _ in range(2 * BURST):
            conn.execute("SELECT 1")
        conn.execute("COMMIT")
    time.sleep(5)  # the debt of the case before the next one


@case(proxied=True)
def a_tier_edit_reaches_open_sessions_within_a_second():
    if "catalog" not in READY:
        raise AssertionError("the ready file names no catalog")
    with connect() as conn:
        start = time.monotonic()
        edit(FREE, tier="STARTER")
        try:
            # STARTER allows ten connections: six sleepers run at once now.
            time.sleep(max(0.0, 1.0 - (time.monotonic() - start)))
            clients = [conn] + [connect() for _ in range(5)]
            with Backends() as backends, ThreadPoolExecutor(6) as threads:
                list(threads.map(lambda c: c.execute("SELECT pg_sleep(1)"), clients))
            equal(backends.most, 6)
            for other in clients[1:]:
                other.close()
        finally:
            edit(FREE, tier="FREE")
        time.sleep(1.0)
        clients = [conn] + [connect() for _ in range(5)]
        with Backends() as backends, ThreadPoolExecutor(6) as threads:
            list(threads.map(lambda c: c.execute("SELECT pg_sleep(1)"), clients))
        equal(backends.most, CONNECTIONS)
        for other in clients[1:]:
            other.close()


@case(proxied=True)
def suspension_ends_sessions_and_refuses_new_ones():
    idle, busy = connect(), connect()
    codes = []

    def run():
        try:
            busy.execute("SELECT pg_sleep(2)")
            busy.execute("SELECT 1")
        except psycopg.Error as error:
            codes.append(error.sqlstate)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        time.sleep(0.3)
        edit(FREE, status="suspended")

        def ended():
            try:
                idle.execute("SELECT 1")
            except psycopg.OperationalError as error:
                equal(error.sqlstate, "57P01")
                return True
            return False

        soon("the idle session ends", 1.5, ended)
        with Raises("55000"):
            connect()
        thread.join(10)
        equal(codes, ["57P01"])
        with connect("globex") as other:
            equal(other.execute("SELECT 1").fetchone(), (1,))
    finally:
        edit(FREE, status="active")
        thread.join(10)
    soon("it is served again", 2, lambda: connect().close() is None)


if __name__ == "__main__":
    main()
