"""asyncpg: its own protocol code, always the extended protocol with named statements."""

import asyncio
import datetime
import decimal
import uuid

import asyncpg
from harness import Raises, case, equal, main, tenant, url

ORG = "initech"


async def connect(org=ORG, **options):
    return await asyncpg.connect(url(org), timeout=10, ssl=False, **options)


def fresh(prefix="a"):
    return f"{prefix}_{uuid.uuid4().hex[:12]}"


@case
async def a_pool_of_ten_on_free():
    # Ten clients share the five connections of the tier. 40 statements stay within its burst.
    async with asyncpg.create_pool(url("acme"), min_size=10, max_size=10, ssl=False, timeout=10) as pool:
        async def one(i):
            async with pool.acquire() as conn:
                return (await conn.fetchrow("SELECT $1::int, pg_sleep(0.05)", i))[0]
        equal(sorted(await asyncio.gather(*(one(i) for i in range(20)))), list(range(20)))


@case
async def prepared_statements():
    conn = await connect()
    statement = await conn.prepare("SELECT $1::int * 2 AS twice, $2::text")
    equal([p.name for p in statement.get_parameters()], ["int4", "text"])
    equal([a.name for a in statement.get_attributes()], ["twice", "text"])
    for i in range(50):
        equal(tuple(await statement.fetchrow(i, str(i))), (2 * i, str(i)))
    many = [await conn.prepare(f"SELECT {i}") for i in range(150)]
    for i, each in enumerate(many):
        equal(await each.fetchval(), i)
    await conn.close()


@case
async def types_come_back_as_they_were():
    conn = await connect()
    values = {
        "int8": 2**62, "float8": 1.5, "numeric": decimal.Decimal("12345678901234567890.0123"), "text": "né\n",
        "bytea": bytes(range(256)), "uuid": uuid.uuid4(), "timestamptz": datetime.datetime.now(datetime.timezone.utc),
        "interval": datetime.timedelta(days=1, seconds=5), "bool": True, "int4[]": [1, None, 3],
        "jsonb": '{"a": 1}', "inet": None, "date": datetime.date(2024, 2, 29),
    }
    for name, value in values.items():
        equal(await conn.fetchval(f"SELECT $1::{name}", value), value)
    await conn.close()


@case
async def introspection_of_own_types():
    conn = await connect()
    name = fresh("mood")
    await conn.execute(f"CREATE TYPE {name} AS ENUM ('sad', 'happy'); CREATE TYPE {name}_c AS (m {name}, n int[])")
    equal(await conn.fetchval(f"SELECT 'happy'::{name}"), "happy")
    row = await conn.fetchval(f"SELECT ROW('sad', ARRAY[1,2])::{name}_c")
    equal((row["m"], row["n"]), ("sad", [1, 2]))
    equal(await conn.fetchval(f"SELECT $1::{name}[]", ["sad", "happy"]), ["sad", "happy"])
    await conn.execute(f"DROP TYPE {name}_c; DROP TYPE {name}")
    await conn.close()


@case
async def copy_records():
    conn, name = await connect(), fresh()
    await conn.execute(f"CREATE TABLE {name} (a int, b text)")
    tag = await conn.copy_records_to_table(name, records=[(i, str(i)) for i in range(10_000)])
    equal(tag, "COPY 10000")
    got = []

    async def sink(data):
        got.append(data)

    equal(await conn.copy_from_query(f"SELECT a FROM {name}", output=sink), "COPY 10000")
    equal(sum(int(line) for line in b"".join(got).split()), sum(range(10_000)))
    with Raises("23502"):
        await conn.execute(f"ALTER TABLE {name} ALTER a SET NOT NULL")
        await conn.copy_records_to_table(name, records=[(1, "x"), (None, "y")])
    equal(await conn.fetchval(f"SELECT count(*) FROM {name}"), 10_000)
    await conn.execute(f"DROP TABLE {name}")
    await conn.close()


@case
async def listeners():
    ear, mouth, channel = await connect(), await connect(), fresh("c")
    heard = asyncio.Queue()
    await ear.add_listener(channel, lambda _c, _pid, _ch, payload: heard.put_nowait(payload))
    for i in range(3):
        await mouth.execute("SELECT pg_notify($1, $2)", channel, str(i))
    equal([await asyncio.wait_for(heard.get(), 10) for _ in range(3)], ["0", "1", "2"])
    await ear.reset()
    await ear.close()
    await mouth.close()


@case
async def transactions():
    conn, name = await connect(), fresh()
    await conn.execute(f"CREATE TABLE {name} (a int)")
    async with conn.transaction():
        await conn.execute(f"INSERT INTO {name} VALUES (1)")
        with Raises("22012"):
            async with conn.transaction():
                await conn.execute(f"INSERT INTO {name} VALUES (2)")
                await conn.execute("SELECT 1/0")
        cursor = await conn.cursor("SELECT generate_series(1, 500)")
        equal(len(await cursor.fetch(200)), 200)
        equal(sum([row[0] async for row in conn.cursor("SELECT generate_series(1, 300)", prefetch=7)]), 45150)
    for level in ["serializable", "repeatable_read"]:
        async with conn.transaction(isolation=level, readonly=True):
            equal(await conn.fetchval(f"SELECT count(*) FROM {name}"), 1)
    await conn.execute(f"DROP TABLE {name}")
    await conn.close()


@case
async def a_released_connection_is_reset():
    async with asyncpg.create_pool(url(ORG), min_size=1, max_size=1, ssl=False) as pool:
        async with pool.acquire() as conn:
            await conn.execute("SET work_mem = '9MB'; CREATE TEMP TABLE mine (a int)")
            equal(await conn.fetchval("SHOW work_mem"), "9MB")
            await conn.fetchval("SELECT pg_advisory_lock(4711)")
        async with pool.acquire() as conn:
            assert await conn.fetchval("SHOW work_mem") != "9MB"
            other = await connect()
            equal(await other.fetchval("SELECT pg_try_advisory_lock(4711)"), True)
            await other.close()


@case
async def a_changed_table_is_noticed():
    ddl, conn, name = await connect(), await connect(), fresh()
    await ddl.execute(f"CREATE TABLE {name} (a int)")
    await ddl.execute(f"INSERT INTO {name} VALUES (1)")
    for _ in range(3):
        equal(await conn.fetchval(f"SELECT a FROM {name}"), 1)
    await ddl.execute(f"ALTER TABLE {name} ALTER a TYPE text USING 'x' || a")
    # Outside a transaction asyncpg prepares again by itself when told 0A000.
    equal(await conn.fetchval(f"SELECT a FROM {name}"), "x1")
    equal(dict(await conn.fetchrow(f"SELECT * FROM {name}")), {"a": "x1"})
    await ddl.execute(f"ALTER TABLE {name} ADD b int DEFAULT 5")
    equal(dict(await conn.fetchrow(f"SELECT * FROM {name}")), {"a": "x1", "b": 5})
    await ddl.execute(f"DROP TABLE {name}")
    await ddl.close()
    await conn.close()


@case
async def a_timeout_cancels():
    conn = await connect()
    try:
        await conn.fetchval("SELECT pg_sleep(30)", timeout=0.5)
    except asyncio.TimeoutError:
        pass
    else:
        raise AssertionError("it slept on")
    equal(await conn.fetchval("SELECT 1"), 1)
    await conn.close()


@case
async def refusals_at_login():
    for parts, code in [({"password": "wrong"}, "28P01"), ({"user": "nobody"}, "28P01"),
                        ({"database": "nothing_here"}, "3D000")]:
        with Raises(code):
            await asyncpg.connect(url(ORG, **parts), timeout=10, ssl=False)


@case(proxied=True)
async def a_token_of_another_tenant_opens_that_tenant_only():
    conn = await asyncpg.connect(url("acme", password=tenant("globex")["token"]), timeout=10, ssl=False)
    other = await connect("globex")
    equal(await conn.fetchval("SELECT current_database()"), await other.fetchval("SELECT current_database()"))
    await conn.close()
    await other.close()


if __name__ == "__main__":
    main()
