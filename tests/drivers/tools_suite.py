"""PostgreSQL's own programs: psql, pg_dump, pg_restore, pgbench."""

import subprocess
import tempfile
import uuid
from pathlib import Path

from harness import case, equal, libpq, main, url

ORG = "umbrella"
OTHER = "initech"
SCHEMA = """
CREATE SCHEMA {s};
SET search_path = {s};
CREATE TYPE mood AS ENUM ('sad', 'happy');
CREATE DOMAIN positive AS int CHECK (VALUE > 0);
CREATE SEQUENCE counter START 100;
CREATE TABLE people (id bigserial PRIMARY KEY, name text NOT NULL, m mood DEFAULT 'happy', n positive, tags text[],
    born timestamptz DEFAULT now(), doc jsonb, raw bytea);
CREATE TABLE pets (id int GENERATED ALWAYS AS IDENTITY, owner bigint REFERENCES people ON DELETE CASCADE, UNIQUE (id));
CREATE INDEX people_name ON people (lower(name)) WHERE n > 1;
CREATE VIEW happy AS SELECT * FROM people WHERE m = 'happy';
CREATE MATERIALIZED VIEW counted AS SELECT count(*) FROM people;
CREATE FUNCTION twice(int) RETURNS int LANGUAGE sql AS 'SELECT $1 * 2';
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.name := upper(NEW.name); RETURN NEW; END $$;
CREATE TRIGGER loud BEFORE INSERT ON people FOR EACH ROW EXECUTE FUNCTION note();
INSERT INTO people (name, n, tags, doc, raw)
    SELECT 'name' || i, i, ARRAY['a', 'b' || i], jsonb_build_object('i', i), decode(md5(i::text), 'hex')
    FROM generate_series(1, 5000) i;
INSERT INTO pets (owner) SELECT id FROM people LIMIT 1000;
SELECT nextval('counter');
"""
FACTS = """
SELECT count(*), sum(n), min(name), md5(string_agg(raw::text, '' ORDER BY id)) FROM {s}.people;
SELECT count(*) FROM {s}.pets; SELECT {s}.twice(21); SELECT last_value FROM {s}.counter;
SELECT count(*) FROM pg_indexes WHERE schemaname = '{s}'; SELECT enum_range(NULL::{s}.mood);
"""


def fresh():
    return f"s_{uuid.uuid4().hex[:12]}"


def run(*command, org=ORG, text="", fails=False):
    done = subprocess.run(command, input=text, env=libpq(url(org)), capture_output=True, text=True, timeout=80)
    bad = done.returncode == 0 if fails else done.returncode != 0
    assert not bad, f"{command[0]} ended with {done.returncode}: {done.stderr[-300:]}"
    return done.stderr if fails else done.stdout


def psql(text, org=ORG, **options):
    return run("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", org=org, text=text, **options)


def drop(schema, *orgs):
    for org in orgs:
        psql(f"DROP SCHEMA IF EXISTS {schema} CASCADE", org=org)


@case
def backslash_commands():
    name = fresh()
    psql(f"CREATE TABLE {name} (a int PRIMARY KEY, b text)")
    assert name in psql("\\d")
    assert "a|integer" in psql(f"\\d {name}")
    for command in ["\\l", "\\dn", "\\du", "\\dfS lower", "\\dTS int4", "\\dt+", "\\conninfo", f"\\d+ {name}"]:
        assert psql(command).strip(), f"{command} printed nothing"
    equal(psql("SELECT 1 AS one, 'x'::text AS t \\gdesc").split(), ["one|integer", "t|text"])
    equal(psql("SELECT 'SELECT ' || i FROM generate_series(1, 3) i \\gexec").split()[-3:], ["1", "2", "3"])
    equal(psql("SELECT $1::int + 1 \\bind 4 \\g") if "\\bind" in run("psql", "-X", "--help=commands") else "5\n", "5\n")
    psql(f"DROP TABLE {name}")


@case
def several_statements_and_errors():
    equal(psql("SELECT 1; SELECT 2;\nBEGIN; SELECT 3; COMMIT;").split(), ["1", "2", "3"])
    equal(run("psql", "-XAtq", "-c", "SELECT 1; SELECT 2").split(), ["1", "2"])
    assert "division by zero" in psql("SELECT 1/0", fails=True)
    equal(run("psql", "-XAtq", "-1", text="CREATE TEMP TABLE x (a int); INSERT INTO x VALUES (1); TABLE x").split(), ["1"])


@case
def backslash_copy():
    name = fresh()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.csv")
        path.write_text("".join(f'{i},"a ""b"" {i}"\n' for i in range(5000)))
        psql(f"CREATE TABLE {name} (a int, b text)\n;\\copy {name} FROM '{path}' CSV")
        out = Path(folder, "out.csv")
        psql(f"\\copy (SELECT * FROM {name} ORDER BY a) TO '{out}' CSV")
        equal(out.read_text(), path.read_text())
    psql(f"DROP TABLE {name}")


@case
def dump_piped_into_another_tenant():
    name = fresh()
    try:
        psql(SCHEMA.format(s=name))
        dump = run("pg_dump", "--no-owner", "--no-privileges", "-n", name)
        psql(dump, org=OTHER)
        equal(psql(FACTS.format(s=name), org=OTHER), psql(FACTS.format(s=name)))
    finally:
        drop(name, ORG, OTHER)


@case
def dump_of_large_objects():
    (oid,) = psql("SELECT lo_from_bytea(0, decode(repeat('61', 100000), 'hex'))").split()
    try:
        dump = run("pg_dump", "--no-owner", "--no-privileges", "--blobs", "-n", "nothing_like_it", "--strict-names",
                   fails=True)
        assert "no matching schemas" in dump
        dump = run("pg_dump", "--no-owner", "--no-privileges", "--blobs", "--exclude-schema=*")
        psql(dump, org=OTHER)
        equal(psql(f"SELECT length(lo_get({oid}))", org=OTHER).strip(), "100000")
        psql(f"SELECT lo_unlink({oid})", org=OTHER)
    finally:
        psql(f"SELECT lo_unlink({oid})")


@case
def restore_of_a_custom_archive_in_parallel():
    name = fresh()
    with tempfile.TemporaryDirectory() as folder:
        archive = str(Path(folder, "dump"))
        try:
            psql(SCHEMA.format(s=name))
            facts = psql(FACTS.format(s=name))
            run("pg_dump", "-Fc", "-n", name, "-f", archive)
            drop(name, ORG)
            run("pg_restore", "--no-owner", "-j", "2", "-d", libpq(url(ORG))["PGDATABASE"], archive)
            equal(psql(FACTS.format(s=name)), facts)
        finally:
            drop(name, ORG)


@case
def dump_in_parallel():
    name = fresh()
    with tempfile.TemporaryDirectory() as folder:
        try:
            psql(SCHEMA.format(s=name))
            run("pg_dump", "-Fd", "-j", "2", "-n", name, "-f", str(Path(folder, "dump")))
        finally:
            drop(name, ORG)


@case
def pgbench():
    try:
        run("pgbench", "-iq", "-s", "1")
        for mode in ["simple", "extended", "prepared"]:
            for kind in [[], ["-S"]]:
                out = run("pgbench", "-n", *kind, "-M", mode, "-c", "16", "-j", "2", "-t", "50")
                assert "number of transactions actually processed: 800/800" in out, f"{mode}: {out[-300:]}"
        equal(psql("SELECT sum(bbalance) = (SELECT sum(delta) FROM pgbench_history) FROM pgbench_branches").strip(), "t")
        run("pgbench", "-n", "-S", "-C", "-c", "4", "-t", "20")
    finally:
        psql("DROP TABLE IF EXISTS pgbench_accounts, pgbench_branches, pgbench_history, pgbench_tellers")


if __name__ == "__main__":
    main()
