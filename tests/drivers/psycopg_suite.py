"""psycopg 3 (libpq): sync and async, every mode of the protocol it can speak."""

import asyncio
import threading
import time
import uuid

import psycopg
from harness import LOGIN_WORDS, PLAIN, Raises, case, equal, main, tenant, url
from psycopg import sql

ORG = "initech"


def connect(org=ORG, **options):
    return psycopg.connect(url(org), connect_timeout=10, **options)


def fresh(prefix="t"):
    return f"{prefix}_{uuid.uuid4().hex[:12]}"


@case
def simple_and_extended():
    with connect() as conn:
        equal(conn.execute("SELECT 1, 'two'").fetchone(), (1, "two"))
        equal(conn.execute("SELECT %s::int + %s::int", (20, 22)).fetchone(), (42,))
        equal(conn.execute("SELECT %s::bytea", (b"\0\xff",), binary=True).fetchone(), (b"\0\xff",))
        cur = psycopg.ClientCursor(conn)
        cur.execute("SELECT 1; SELECT 'a', 2")
        equal(cur.fetchall(), [(1,)])
        assert cur.nextset()
        equal(cur.fetchall(), [("a", 2)])


@case
def async_connection():
    async def go():
        async with await psycopg.AsyncConnection.connect(url(ORG)) as conn:
            cur = await conn.execute("SELECT generate_series(1, 1000)")
            equal(len(await cur.fetchall()), 1000)
            tasks = []
            for i in range(8):
                async def one(i=i):
                    async with await psycopg.AsyncConnection.connect(url(ORG)) as own:
                        cur = await own.execute("SELECT %s::int", (i,))
                        return (await cur.fetchone())[0]
                tasks.append(one())
            equal(await asyncio.gather(*tasks), list(range(8)))
    return go()


@case
def prepared_across_transactions():
    with connect(prepare_threshold=1, autocommit=True) as one, connect(prepare_threshold=1, autocommit=True) as two:
        for i in range(30):
            equal(one.execute("SELECT %s::int * 2", (i,)).fetchone(), (i * 2,))
            equal(two.execute("SELECT %s::text || 'x'", (str(i),)).fetchone(), (f"{i}x",))
            equal(two.execute("SELECT %s::int * 2", (i,)).fetchone(), (i * 2,))


@case
def prepared_eviction():
    with connect(prepare_threshold=0, autocommit=True) as conn:
        conn.prepared_max = 5
        for round_ in range(3):
            for i in range(20):
                equal(conn.execute(f"SELECT %s::int + {i}", (round_,)).fetchone(), (round_ + i,))


@case
def deallocate_by_sql():
    with connect(autocommit=True) as conn:
        conn.execute("PREPARE mine AS SELECT 7")
        equal(conn.execute("EXECUTE mine").fetchone(), (7,))
        with Raises("42P05"):
            conn.execute("PREPARE mine AS SELECT 8")
        conn.execute("DEALLOCATE mine")
        with Raises("26000"):
            conn.execute("EXECUTE mine")


@case
def prepared_statement_names():
    with connect(autocommit=True) as conn:
        pg = conn.pgconn
        ok = psycopg.pq.ExecStatus.COMMAND_OK
        equal(pg.prepare(b"stmt", b"SELECT $1::int").status, ok)
        taken = pg.prepare(b"stmt", b"SELECT 2")
        equal(taken.error_field(psycopg.pq.DiagnosticField.SQLSTATE), b"42P05")
        assert b'"stmt"' in taken.error_field(psycopg.pq.DiagnosticField.MESSAGE_PRIMARY)
        missing = pg.exec_prepared(b"nothing", None)
        equal(missing.error_field(psycopg.pq.DiagnosticField.SQLSTATE), b"26000")
        assert b'"nothing"' in missing.error_field(psycopg.pq.DiagnosticField.MESSAGE_PRIMARY)
        broken = pg.prepare(b"bad", b"SELEC")
        equal(broken.error_field(psycopg.pq.DiagnosticField.SQLSTATE), b"42601")
        equal(pg.prepare(b"bad", b"SELECT 5").status, ok)
        equal(pg.exec_prepared(b"bad", None).get_value(0, 0), b"5")
        equal(pg.exec_prepared(b"stmt", [b"9"]).get_value(0, 0), b"9")
        equal(pg.describe_prepared(b"stmt").nfields, 1)


@case
def unnamed_statement_is_ones_own():
    with connect(autocommit=True) as one, connect(autocommit=True) as two:
        one.pgconn.prepare(b"", b"SELECT 'one'")
        two.pgconn.prepare(b"", b"SELECT 'two'")
        equal(one.pgconn.exec_prepared(b"", None).get_value(0, 0), b"one")
        equal(two.pgconn.exec_prepared(b"", None).get_value(0, 0), b"two")
        one.execute("SELECT 1")


@case
def statements_survive_ddl_elsewhere():
    name = fresh()
    with connect(autocommit=True) as ddl, connect(autocommit=True, prepare_threshold=None) as conn:
        ddl.execute(f"CREATE TABLE {name} (a int)")
        ddl.execute(f"INSERT INTO {name} VALUES (1)")
        query = f"SELECT * FROM {name}".encode()
        conn.pgconn.prepare(b"s1", query)
        equal(conn.pgconn.exec_prepared(b"s1", None).get_value(0, 0), b"1")
        ddl.execute(f"ALTER TABLE {name} ALTER a TYPE text USING 'x' || a")
        conn.pgconn.prepare(b"s2", query)
        equal(conn.pgconn.exec_prepared(b"s2", None).get_value(0, 0), b"x1")
        ddl.execute(f"DROP TABLE {name}")


@case
def pipeline_mode():
    with connect(autocommit=True) as conn:
        with conn.pipeline() as pipeline:
            cursors = [conn.execute("SELECT %s::int", (i,)) for i in range(300)]
            pipeline.sync()
            more = [conn.execute("SELECT %s::int", (-i,)) for i in range(50)]
        equal([c.fetchone()[0] for c in cursors], list(range(300)))
        equal([c.fetchone()[0] for c in more], [-i for i in range(50)])


@case
def errors_mid_pipeline():
    with connect(autocommit=True) as conn:
        pg, status = conn.pgconn, psycopg.pq.ExecStatus
        pg.enter_pipeline_mode()
        for segment in [["1"], ["1/0", "2", "3"], ["4"]]:
            for expression in segment:
                pg.send_query_params(f"SELECT {expression}".encode(), None)
            pg.pipeline_sync()
        seen = []
        while seen.count("sync") < 3:
            result = pg.get_result()
            if result is None:
                continue
            seen.append({
                status.TUPLES_OK: lambda r: r.get_value(0, 0).decode(),
                status.FATAL_ERROR: lambda r: r.error_field(psycopg.pq.DiagnosticField.SQLSTATE).decode(),
                status.PIPELINE_ABORTED: lambda r: "aborted",
                status.PIPELINE_SYNC: lambda r: "sync",
            }[result.status](result))
        equal(seen, ["1", "sync", "22012", "aborted", "aborted", "sync", "4", "sync"])
        pg.exit_pipeline_mode()
        equal(conn.execute("SELECT 5").fetchone(), (5,))


@case
def a_refused_parse_does_not_poison_its_name():
    with connect(autocommit=True, prepare_threshold=1) as conn:
        for _ in range(3):
            with Raises("42P01"):
                conn.execute("SELECT * FROM not_there_at_all")
            equal(conn.execute("SELECT 1").fetchone(), (1,))


@case
def executemany():
    name = fresh()
    with connect() as conn:
        conn.execute(f"CREATE TEMP TABLE {name} (a int, b text)")
        with conn.cursor() as cur:
            cur.executemany(f"INSERT INTO {name} VALUES (%s, %s)", [(i, str(i)) for i in range(500)])
            equal(cur.rowcount, 500)
        equal(conn.execute(f"SELECT count(*), sum(a) FROM {name}").fetchone(), (500, 124750))


@case
def copy_text_and_binary():
    name = fresh()
    with connect() as conn:
        conn.execute(f"CREATE TABLE {name} (a int, b text)")
        with conn.cursor().copy(f"COPY {name} FROM STDIN") as copy:
            for i in range(20_000):
                copy.write_row((i, f"tab\t{i}\n\\"))
        with conn.cursor().copy(f"COPY {name} FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(["int4", "text"])
            for i in range(1000):
                copy.write_row((-i, "b"))
        with conn.cursor().copy(f"COPY {name} TO STDOUT") as copy:
            equal(sum(1 for _ in copy.rows()), 21_000)
        with conn.cursor().copy(f"COPY (SELECT a FROM {name} WHERE a >= 0) TO STDOUT (FORMAT binary)") as copy:
            copy.set_types(["int4"])
            equal(sum(row[0] for row in copy.rows()), sum(range(20_000)))
        conn.execute(f"DROP TABLE {name}")


@case
def copy_errors_leave_the_connection_usable():
    name = fresh()
    with connect(autocommit=True) as conn:
        conn.execute(f"CREATE TABLE {name} (a int)")
        with Raises("22P02"):
            with conn.cursor().copy(f"COPY {name} FROM STDIN") as copy:
                copy.write("1\nnonsense\n")
                copy.write("2\n" * 10_000)
        equal(conn.execute(f"SELECT count(*) FROM {name}").fetchone(), (0,))
        try:
            with conn.cursor().copy(f"COPY {name} FROM STDIN") as copy:
                copy.write("1\n")
                raise KeyError("changed my mind")
        except KeyError:
            pass
        equal(conn.execute(f"SELECT count(*) FROM {name}").fetchone(), (0,))
        conn.execute(f"DROP TABLE {name}")


@case
def named_cursors():
    with connect() as conn:
        with conn.cursor("server_side") as cur:
            cur.itersize = 100
            cur.execute("SELECT generate_series(1, 1050)")
            equal(sum(1 for _ in cur), 1050)
        conn.commit()
        held = conn.cursor("held", withhold=True)
        held.execute("SELECT generate_series(1, 10)")
        conn.commit()
        conn.execute("SELECT 1")
        conn.commit()
        equal([row[0] for row in held.fetchmany(10)], list(range(1, 11)))
        held.close()


@case
def transactions():
    name = fresh()
    with connect() as conn:
        conn.execute(f"CREATE TABLE {name} (a int)")
        conn.commit()
        conn.execute(f"INSERT INTO {name} VALUES (1)")
        conn.rollback()
        with conn.transaction():
            conn.execute(f"INSERT INTO {name} VALUES (2)")
            try:
                with conn.transaction():
                    conn.execute(f"INSERT INTO {name} VALUES (3)")
                    conn.execute("SELECT 1/0")
            except psycopg.errors.DivisionByZero:
                pass
        equal(conn.execute(f"SELECT array_agg(a) FROM {name}").fetchone(), ([2],))
        with Raises("22012"):
            conn.execute("SELECT 1/0")
        with Raises("25P02"):
            conn.execute("SELECT 1")
        conn.rollback()
        conn.autocommit = True
        conn.execute(f"BEGIN; INSERT INTO {name} VALUES (4); COMMIT AND CHAIN; INSERT INTO {name} VALUES (5); ROLLBACK")
        equal(conn.execute(f"SELECT count(*) FROM {name}").fetchone(), (2,))
        conn.execute(f"DROP TABLE {name}")


@case
def a_vanished_client_is_rolled_back():
    name = fresh()
    with connect(autocommit=True) as watch:
        watch.execute(f"CREATE TABLE {name} (a int)")
        conn = connect()
        conn.execute(f"LOCK TABLE {name} IN ACCESS EXCLUSIVE MODE")
        conn.execute(f"INSERT INTO {name} VALUES (1)")
        conn.pgconn.finish()
        watch.execute("SET lock_timeout = '5s'")
        equal(watch.execute(f"SELECT count(*) FROM {name}").fetchone(), (0,))
        watch.execute(f"DROP TABLE {name}")


@case
def notices():
    with connect(autocommit=True) as conn:
        heard = []
        conn.add_notice_handler(lambda diagnostic: heard.append(diagnostic.message_primary))
        conn.execute("DO $$ BEGIN RAISE NOTICE 'hear this'; END $$")
        assert "hear this" in heard, heard


@case
def listen_and_notify():
    with connect(autocommit=True) as ear, connect(autocommit=True) as mouth:
        channel = fresh("c")
        ear.execute(f"LISTEN {channel}")
        for i in range(3):
            mouth.execute("SELECT pg_notify(%s, %s)", (channel, str(i)))
        heard = [note.payload for note in ear.notifies(timeout=10, stop_after=3)]
        equal(heard, ["0", "1", "2"])
        ear.execute("UNLISTEN *")


@case
def settings_follow_the_client():
    with connect(autocommit=True) as one, connect(autocommit=True) as two:
        one.execute("SET search_path = pg_catalog")
        one.execute("SET TimeZone = 'Asia/Tokyo'")
        one.execute("SELECT set_config('app.caller', 'one', false)")
        one.execute("SET work_mem = '5MB'")
        for _ in range(10):
            equal(two.execute("SHOW search_path").fetchone(), ('"$user", public',))
            assert two.execute("SHOW TimeZone").fetchone() != ("Asia/Tokyo",)
            assert two.execute("SELECT current_setting('app.caller', true)").fetchone()[0] in (None, "")
            equal(one.execute("SHOW search_path").fetchone(), ("pg_catalog",))
            equal(one.execute("SHOW TimeZone").fetchone(), ("Asia/Tokyo",))
            equal(one.execute("SHOW app.caller").fetchone(), ("one",))
            equal(one.execute("SHOW work_mem").fetchone(), ("5MB",))
        equal(one.info.timezone.key, "Asia/Tokyo")
        one.execute("RESET search_path")
        equal(one.execute("SHOW search_path").fetchone(), ('"$user", public',))
        one.autocommit = False
        one.execute("SET search_path = information_schema")
        one.rollback()
        equal(one.execute("SHOW search_path").fetchone(), ('"$user", public',))
        one.execute("SET LOCAL work_mem = '6MB'")
        one.commit()
        equal(one.execute("SHOW work_mem").fetchone(), ("5MB",))


@case
def startup_parameters():
    options = "-c search_path=pg_catalog -c extra_float_digits=2 -c lock_timeout=1234"
    with connect(options=options, application_name="suite", client_encoding="UTF8") as conn:
        for _ in range(5):
            equal(conn.execute("SHOW search_path").fetchone(), ("pg_catalog",))
            equal(conn.execute("SHOW extra_float_digits").fetchone(), ("2",))
            equal(conn.execute("SHOW lock_timeout").fetchone(), ("1234ms",))
            equal(conn.execute("SHOW application_name").fetchone(), ("suite",))
            conn.commit()
        equal(conn.info.parameter_status("client_encoding"), "UTF8")


@case
def discard_all():
    with connect(autocommit=True) as conn:
        conn.execute("SET work_mem = '7MB'")
        conn.execute("CREATE TEMP TABLE gone (a int)")
        conn.execute("PREPARE gone AS SELECT 1")
        conn.execute("DISCARD ALL")
        assert conn.execute("SHOW work_mem").fetchone() != ("7MB",)
        with Raises("42P01"):
            conn.execute("SELECT * FROM gone")
        with Raises("26000"):
            conn.execute("EXECUTE gone")


@case
def advisory_locks():
    key = uuid.uuid4().int & 0x7FFFFFFF
    with connect(autocommit=True) as one, connect(autocommit=True) as two:
        one.execute("SELECT pg_advisory_lock(%s)", (key,))
        for _ in range(5):
            equal(two.execute("SELECT pg_try_advisory_lock(%s)", (key,)).fetchone(), (False,))
        equal(one.execute("SELECT pg_advisory_unlock(%s)", (key,)).fetchone(), (True,))
        equal(two.execute("SELECT pg_try_advisory_lock(%s)", (key,)).fetchone(), (True,))
    with connect(autocommit=True) as three:
        deadline = time.monotonic() + 5
        while not three.execute("SELECT pg_try_advisory_lock(%s)", (key,)).fetchone()[0]:
            assert time.monotonic() < deadline, "a lock outlived its client"
            time.sleep(0.05)


@case
def temp_tables():
    with connect(autocommit=True) as one, connect(autocommit=True) as two:
        one.execute("CREATE TEMP TABLE mine (a int)")
        for i in range(5):
            one.execute("INSERT INTO mine VALUES (%s)", (i,))
            with Raises("42P01"):
                two.execute("SELECT * FROM mine")
        equal(one.execute("SELECT count(*) FROM mine").fetchone(), (5,))


@case
def sequences_of_the_session():
    name = fresh("s")
    with connect(autocommit=True) as one, connect(autocommit=True) as two:
        one.execute(f"CREATE SEQUENCE {name}")
        equal(one.execute(f"SELECT nextval('{name}')").fetchone(), (1,))
        equal(two.execute(f"SELECT nextval('{name}')").fetchone(), (2,))
        equal(one.execute(f"SELECT currval('{name}')").fetchone(), (1,))
        one.execute(f"DROP SEQUENCE {name}")


@case
def cancel():
    with connect(autocommit=True) as conn, connect(autocommit=True) as bystander:
        timer = threading.Timer(0.5, conn.cancel_safe)
        timer.start()
        start = time.monotonic()
        with Raises("57014"):
            conn.execute("SELECT pg_sleep(30)")
        assert time.monotonic() - start < 10
        timer.join()
        equal(bystander.execute("SELECT pg_sleep(0.3), 1").fetchone()[1], 1)
        equal(conn.execute("SELECT 1").fetchone(), (1,))
        conn.cancel_safe()
        equal(conn.execute("SELECT 2").fetchone(), (2,))


@case
def large_rows():
    size = 20 << 20
    with connect(autocommit=True) as conn:
        (text,) = conn.execute("SELECT repeat('x', %s)", (size,)).fetchone()
        equal(len(text), size)
        (length,) = conn.execute("SELECT length(%s::text)", ("y" * size,)).fetchone()
        equal(length, size)
        equal(len(conn.execute("SELECT repeat('z', 1000) FROM generate_series(1, 20000)").fetchall()), 20_000)


@case
def large_objects():
    with connect() as conn:
        (oid,) = conn.execute("SELECT lo_from_bytea(0, %s)", (b"abc" * 1000,)).fetchone()
        equal(conn.execute("SELECT length(lo_get(%s))", (oid,)).fetchone(), (3000,))
        conn.execute("SELECT lo_unlink(%s)", (oid,))


@case
def two_phase_commit_is_refused_by_the_server():
    with connect(autocommit=True) as conn:
        conn.execute("BEGIN")
        with Raises("55000", "0A000"):
            conn.execute("PREPARE TRANSACTION 'x'")


@case(proxied=True)
def statement_timeout_of_free():
    with connect("acme", autocommit=True) as conn:
        conn.execute("SET statement_timeout = 0")
        start = time.monotonic()
        with Raises("57014") as raised:
            conn.execute("SELECT pg_sleep(30)")
        took = time.monotonic() - start
        assert 8 < took < 14, f"after {took:.1f} s"
        equal(raised.error.diag.message_primary, "canceling statement due to statement timeout")
        assert "FREE" in (raised.error.diag.message_detail or ""), raised.error.diag.message_detail
        equal(conn.execute("SELECT 1").fetchone(), (1,))


@case
def wrong_password():
    token = tenant(ORG)["token"]
    for bad in ["wrong", token[:-2] + ("AA" if not token.endswith("AA") else "BB")]:
        with Raises("28P01"):
            psycopg.connect(url(ORG, password=bad), connect_timeout=10)


@case
def unknown_database():
    with Raises("3D000") as raised:
        psycopg.connect(url(ORG, database="nothing_here"), connect_timeout=10)
    assert 'database "nothing_here" does not exist' in str(raised.error), raised.error


@case
def unknown_user():
    with Raises("28P01") as raised:
        psycopg.connect(url(ORG, user="nobody"), connect_timeout=10)
    assert f'{LOGIN_WORDS["28P01"]} for user "nobody"' in str(raised.error), raised.error


@case
def identifiers_are_quoted_exactly():
    with connect() as conn:
        name = 'we"ird näme'
        conn.execute(sql.SQL("CREATE TEMP TABLE {} (a int)").format(sql.Identifier(name)))
        equal(conn.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(name))).fetchone(), (0,))


if __name__ == "__main__":
    main()
