"""Tenant A, with A's token, against everything of tenant B. The administrator's view says what B's real names are."""

import threading
import time
import uuid

import psycopg
from harness import ADMIN, Raises, case, equal, main, url
from psycopg import sql

A, B = "initech", "globex"
SECRET = f"secret-{uuid.uuid4().hex}"


def connect(org, **parts):
    return psycopg.connect(url(org, **parts), connect_timeout=10, autocommit=True)


def physical(org):
    """The names of the tenant's role and database in the server itself."""
    with connect(org) as conn:
        return conn.execute("SELECT current_user, current_database()").fetchone()


def refused(conn, statement, *codes):
    with Raises(*(codes or ("42501",))):
        conn.execute(statement)


@case
def roles_are_ordinary():
    with connect(A) as conn:
        role, database = physical(A)
        row = conn.execute("""SELECT rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls
            FROM pg_roles WHERE rolname = current_user""").fetchone()
        equal(row, (False,) * 5)
        equal(conn.execute("SELECT count(*) FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.member "
                           "WHERE r.rolname = current_user").fetchone(), (0,))
        owner = conn.execute("SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()")
        assert owner.fetchone()[0] != role, "the tenant owns its database"


@case
def other_databases_are_closed():
    role, database = physical(B)
    for name in [database, "postgres", "template1", "template0"]:
        # In a plain server the name exists and is closed; through dynabase it can't be written down.
        with Raises("42501", "3D000", "55000"):
            connect(A, database=name)
    with connect(A) as conn:
        for name in [database, "postgres", "template1"]:
            equal(conn.execute("SELECT has_database_privilege(%s, 'CONNECT')", (name,)).fetchone(), (False,))


@case(proxied=True)
def physical_names_do_not_open_doors():
    role, database = physical(A)
    other_role, other_database = physical(B)
    for name in [database, other_database, B, f"org_{B}", "app\x01", "APP", "app ", "app/../x"]:
        with Raises("3D000"):
            connect(A, database=name)
    for name in [role, other_role, B, "postgres"]:
        with Raises("28P01"):
            connect(A, user=name)


@case(proxied=True)
def names_do_not_tell_who_the_others_are():
    with connect(A) as conn:
        seen = conn.execute("SELECT string_agg(datname, ' ') FROM pg_database").fetchone()[0]
        seen += conn.execute("SELECT string_agg(rolname, ' ') FROM pg_roles").fetchone()[0]
        for org in ["acme", "globex", "umbrella"]:
            assert org not in seen, f"{org} stands in a shared catalog"


@case
def becoming_somebody_else():
    other_role, _ = physical(B)
    role = sql.Identifier(other_role)
    with connect(A) as conn:
        refused(conn, sql.SQL("SET ROLE {}").format(role))
        refused(conn, sql.SQL("SET SESSION AUTHORIZATION {}").format(role))
        refused(conn, sql.SQL("SELECT set_config('role', {}, false)").format(other_role))
        refused(conn, sql.SQL("GRANT {} TO CURRENT_USER").format(role))
        refused(conn, sql.SQL("ALTER DEFAULT PRIVILEGES FOR ROLE {} GRANT ALL ON TABLES TO PUBLIC").format(role))
        for statement in ["REASSIGN OWNED BY {} TO CURRENT_USER", "DROP OWNED BY {}"]:
            refused(conn, sql.SQL(statement).format(role))


@case
def startup_options_can_not_change_the_role():
    other_role, _ = physical(B)
    for option in [f"-c role={other_role}", f"-c session_authorization={other_role}", f"--role={other_role}"]:
        try:
            with psycopg.connect(url(A), connect_timeout=10, options=option, autocommit=True) as conn:
                got = conn.execute("SELECT current_user, session_user").fetchone()
                assert other_role not in got, f"{option} made A into B"
        except psycopg.OperationalError:
            pass


@case
def making_and_altering():
    other_role, other_database = physical(B)
    role, database = physical(A)
    own, them = sql.Identifier(role), sql.Identifier(other_role)
    db, their_db = sql.Identifier(database), sql.Identifier(other_database)
    with connect(A) as conn:
        for statement in [
            sql.SQL("CREATE DATABASE mine"), sql.SQL("CREATE ROLE mine"), sql.SQL("CREATE USER mine SUPERUSER"),
            sql.SQL("ALTER ROLE {} SUPERUSER").format(own), sql.SQL("ALTER ROLE {} CONNECTION LIMIT -1").format(own),
            sql.SQL("ALTER ROLE {} CREATEDB").format(own), sql.SQL("ALTER ROLE {} VALID UNTIL 'infinity'").format(own),
            sql.SQL("ALTER ROLE {} PASSWORD 'x'").format(them), sql.SQL("ALTER ROLE {} SET work_mem = '1MB'").format(them),
            sql.SQL("ALTER ROLE ALL SET work_mem = '1MB'"), sql.SQL("DROP ROLE {}").format(them),
            sql.SQL("ALTER DATABASE {} CONNECTION LIMIT -1").format(db),
            sql.SQL("ALTER DATABASE {} SET statement_timeout = 0").format(db),
            sql.SQL("ALTER DATABASE {} OWNER TO {}").format(db, own), sql.SQL("ALTER DATABASE {} RENAME TO x").format(their_db),
            sql.SQL("ALTER DATABASE {} SET work_mem = '1MB'").format(their_db), sql.SQL("DROP DATABASE {}").format(their_db),
            sql.SQL("DROP DATABASE {} WITH (FORCE)").format(their_db),
            sql.SQL("ALTER SYSTEM SET work_mem = '1MB'"), sql.SQL("CREATE TABLESPACE x LOCATION '/tmp'"),
            sql.SQL("CREATE EVENT TRIGGER x ON ddl_command_start EXECUTE FUNCTION pg_notify('a', 'b')"),
            sql.SQL("SELECT pg_reload_conf()"), sql.SQL("SELECT pg_rotate_logfile()"), sql.SQL("CHECKPOINT"),
            sql.SQL("SET session_replication_role = replica"), sql.SQL("SET log_statement = 'none'"),
            sql.SQL("SET temp_file_limit = -1"), sql.SQL("SELECT pg_switch_wal()"),
        ]:
            refused(conn, statement, "42501", "0A000", "42601", "55006")


@case
def opening_ones_own_door_to_others():
    role, database = physical(A)
    other_role, _ = physical(B)
    with connect(A) as conn:
        # Without ownership a GRANT gives a warning (nothing granted) or an error; what counts is what it did.
        for grantee in [sql.SQL("PUBLIC"), sql.Identifier(other_role)]:
            for right in ["CONNECT", "ALL"]:
                try:
                    conn.execute(sql.SQL("GRANT {} ON DATABASE {} TO {}").format(
                        sql.SQL(right), sql.Identifier(database), grantee))
                except psycopg.Error as error:
                    equal(error.sqlstate, "42501")
    with psycopg.connect(ADMIN, autocommit=True) as admin:
        equal(admin.execute("SELECT has_database_privilege(%s, %s, 'CONNECT')", (other_role, database)).fetchone(), (False,))


@case
def files_and_programs():
    with connect(A) as conn:
        conn.execute("CREATE TEMP TABLE t (a text)")
        for statement in [
            "COPY t FROM PROGRAM 'id'", "COPY t TO PROGRAM 'cat'", "COPY t FROM '/etc/passwd'", "COPY t TO '/tmp/x'",
            "SELECT pg_read_file('/etc/passwd')", "SELECT pg_read_binary_file('PG_VERSION')", "SELECT pg_ls_dir('.')",
            "SELECT pg_stat_file('PG_VERSION')", "SELECT lo_import('/etc/passwd')", "SELECT lo_export(1, '/tmp/x')",
            "SELECT pg_ls_logdir()", "SELECT pg_ls_waldir()", "SELECT * FROM pg_hba_file_rules",
            "SELECT rolpassword FROM pg_authid", "SELECT * FROM pg_shadow", "SELECT pg_current_logfile()",
            "SELECT * FROM pg_largeobject", "SELECT * FROM pg_user_mapping",
        ]:
            refused(conn, statement)


@case
def extensions_that_dial_out_or_execute():
    with connect(A) as conn:
        for name in ["dblink", "postgres_fdw", "file_fdw", "adminpack", "plpython3u", "plperlu", "pageinspect"]:
            # Not installed on the server (58P01, 0A000) is as good as not permitted.
            refused(conn, sql.SQL("CREATE EXTENSION {}").format(sql.Identifier(name)), "42501", "58P01", "0A000")
        refused(conn, "CREATE FUNCTION f() RETURNS int LANGUAGE c AS 'libc', 'getpid'")
        refused(conn, "CREATE SERVER s FOREIGN DATA WRAPPER postgres_fdw", "42501", "42704")
        refused(conn, "CREATE FOREIGN DATA WRAPPER w")
        refused(conn, "CREATE SUBSCRIPTION s CONNECTION 'host=127.0.0.1' PUBLICATION p", "42501", "25001")
        refused(conn, "CREATE PUBLICATION p FOR ALL TABLES")
        refused(conn, "SELECT pg_create_logical_replication_slot('s', 'pgoutput')", "42501", "55000")


@case
def sessions_of_others():
    with connect(B) as theirs, connect(A) as conn, psycopg.connect(ADMIN, autocommit=True) as admin:
        their_role, _ = physical(B)
        sleeper = threading.Thread(target=lambda: theirs.execute(f"SELECT pg_sleep(3), '{SECRET}'"))
        sleeper.start()
        find = "SELECT pid FROM pg_stat_activity WHERE query LIKE %s AND pid <> pg_backend_pid()"
        deadline = time.monotonic() + 3
        while (row := admin.execute(find, (f"%{SECRET}%",)).fetchone()) is None:
            assert time.monotonic() < deadline, "the sleeper never showed"
        pid = row[0]
        equal(conn.execute("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%%' "
                           "AND pid = %s", (pid,)).fetchone(), (0,))
        shown = conn.execute("SELECT query FROM pg_stat_activity WHERE pid = %s", (pid,)).fetchone()
        assert shown is None or shown[0] == "<insufficient privilege>", "the text of B's query shows"
        refused(conn, sql.SQL("SELECT pg_terminate_backend({})").format(pid))
        refused(conn, sql.SQL("SELECT pg_cancel_backend({})").format(pid))
        sleeper.join()
        equal(theirs.execute("SELECT 1").fetchone(), (1,))


@case
def data_and_sizes_of_others():
    _, other_database = physical(B)
    table = f"t_{uuid.uuid4().hex[:10]}"
    with connect(B) as theirs, connect(A) as conn:
        theirs.execute(f"CREATE TABLE {table} (a text)")
        theirs.execute(f"INSERT INTO {table} VALUES ('{SECRET}')")
        refused(conn, f"SELECT * FROM public.{table}", "42P01")
        refused(conn, sql.SQL("SELECT * FROM {}.public.{}").format(sql.Identifier(other_database), sql.Identifier(table)), "0A000")
        refused(conn, sql.SQL("SELECT pg_database_size({})").format(other_database))
        channel = f"c_{table}"
        conn.execute(f"LISTEN {channel}")
        theirs.execute(f"NOTIFY {channel}, '{SECRET}'")
        equal(list(conn.notifies(timeout=0.5)), [])
        theirs.execute("SELECT pg_advisory_lock(815)")
        equal(conn.execute("SELECT pg_try_advisory_lock(815)").fetchone(), (True,))
        theirs.execute(f"DROP TABLE {table}")


@case
def shared_objects_carry_nothing_across():
    with connect(A) as conn:
        (own,) = conn.execute("SELECT lo_from_bytea(0, 'mine')").fetchone()
        with connect(B) as theirs:
            refused(theirs, f"SELECT lo_get({own})", "42704")
        conn.execute(f"SELECT lo_unlink({own})")
        for statement in ["CREATE TABLE pg_catalog.x (a int)", "ALTER FUNCTION pg_catalog.lower(text) OWNER TO CURRENT_USER",
                          "COMMENT ON DATABASE postgres IS 'x'"]:
            refused(conn, statement, "42501", "22023", "0A000")


@case(proxied=True)
def replication_is_refused():
    with Raises("0A000") as raised:
        psycopg.connect(url(A) + "?replication=database", connect_timeout=10)
    assert raised.error


if __name__ == "__main__":
    main()
