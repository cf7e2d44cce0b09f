"""redis-py before the proxy: sync, asyncio, RESP2 and RESP3, its exception classes; Celery's and RQ's basic flow.
"""

import asyncio
import json
import subprocess
import threading
import time
import urllib.parse

import redis
import redis.asyncio
import redis.cache

from harness import Skip, case, main, tenant

BIG = tenant("umbrella")["urls"]["redis"]
FREE = tenant("acme")["urls"]["redis"]


def sync(url, protocol):
    r = redis.Redis.from_url(url, protocol=protocol, decode_responses=True)
    r.flushall()
    assert r.ping()
    r.set("k", "v", ex=100)
    assert r.get("k") == "v" and 0 < r.ttl("k") <= 100
    assert r.keys("*") == ["k"] and list(r.scan_iter("k*")) == ["k"]
    r.hset("h", mapping={"a": 1, "b": 2})
    assert r.hgetall("h") == {"a": "1", "b": "2"}
    r.zadd("z", {"m": 1.5, "n": 2})
    assert r.zrange("z", 0, -1, withscores=True)[0][0] == "m"
    with r.pipeline(transaction=True) as pipe:
        assert pipe.incr("n").incr("n").get("n").execute() == [1, 2, "2"]
    with r.pipeline() as pipe:
        pipe.watch("n")
        value = int(pipe.get("n"))
        pipe.multi()
        pipe.set("n", value + 1)
        assert pipe.execute() == [True]
    with r.pipeline() as pipe:
        pipe.watch("n")
        r.set("n", 100)
        pipe.multi()
        pipe.set("n", 1)
        try:
            pipe.execute()
            raise AssertionError("the watched key was changed")
        except redis.WatchError:
            pass
    script = r.register_script("redis.call('SET', 'made:' .. ARGV[1], KEYS[1]) return redis.call('GET', 'made:' .. ARGV[1])")
    assert script(keys=["a"], args=["b"]) == "a"
    assert r.get("made:b") == "a"
    r.xadd("s", {"f": "v"}, id="1-1")
    r.xgroup_create("s", "g", id="0")
    entries = r.xreadgroup("g", "c", {"s": ">"})
    first = entries[0] if isinstance(entries, list) else list(entries.items())[0]
    assert first[0] == "s", entries
    got = []
    ps = r.pubsub(ignore_subscribe_messages=True)
    ps.subscribe("c")
    ps.psubscribe("p*")
    while r.publish("c", "one") != 1:
        pass
    while r.publish("px", "two") != 1:
        pass
    while len(got) < 2:
        message = ps.get_message(timeout=5)
        if message:
            got.append((message["type"], message["channel"], message["data"]))
    assert ("message", "c", "one") in got and ("pmessage", "px", "two") in got, got
    ps.close()
    waiter = threading.Thread(target=lambda: got.append(redis.Redis.from_url(url, protocol=protocol).blpop("q", 5)))
    waiter.start()
    r.rpush("q", "x")
    waiter.join()
    assert got[-1][1] == b"x", got
    for command, error in [
        (("GET",), redis.ResponseError),
        (("CONFIG", "SET", "a", "b"), redis.exceptions.NoPermissionError),
        (("LPUSH", "k", "x"), redis.ResponseError),
        (("EVALSHA", "0" * 40, 0), redis.exceptions.NoScriptError),
    ]:
        try:
            r.execute_command(*command)
            raise AssertionError(command)
        except error:
            pass
    try:
        redis.Redis.from_url(url.split("@")[0][:-3] + "bad@" + url.split("@")[1], protocol=protocol).ping()
        raise AssertionError("a bad token was let in")
    except redis.AuthenticationError:
        pass
    assert r.info()["redis_version"] and r.client_list()[0]["id"]
    lock = r.lock("lock", timeout=5)
    assert lock.acquire() and lock.owned()
    lock.release()


async def aio(url, protocol):
    r = redis.asyncio.Redis.from_url(url, protocol=protocol, decode_responses=True)
    await asyncio.gather(*(r.set(f"a{i}", i) for i in range(50)))
    assert await r.mget([f"a{i}" for i in range(50)]) == [str(i) for i in range(50)]
    async with r.pubsub() as ps:
        await ps.subscribe("c")
        while await r.publish("c", "hello") != 1:
            pass
        async for message in ps.listen():
            if message["type"] == "message":
                assert message["data"] == "hello"
                break
    await r.aclose()


def patiently(ask):
    """Its answer; the case before may have used up the rate."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return ask()
        except redis.ResponseError as error:
            if "max requests limit exceeded" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def oom(url):
    r = redis.Redis.from_url(url)
    patiently(r.flushall)
    for i in range(20):
        patiently(lambda: r.set(f"k{i}", 1))
    try:
        patiently(lambda: r.setrange("big", 100_000_000, "x"))
        raise AssertionError("100 MB fit into FREE")
    except redis.exceptions.OutOfMemoryError:
        pass
    assert 0 < patiently(lambda: r.ttl("k1")) <= 3600
    patiently(r.flushall)


def celery(url):
    from celery import Celery

    app = Celery("suite", broker=url, backend=url)

    @app.task(name="add")
    def add(a, b):
        return a + b

    from celery.contrib.testing.worker import start_worker

    with start_worker(app, perform_ping_check=False, pool="solo"):
        assert add.delay(2, 3).get(timeout=20) == 5


def rq(url):
    from rq import Queue, SimpleWorker
    from rq.timeouts import TimerDeathPenalty

    connection = redis.Redis.from_url(url)
    queue = Queue("suite", connection=connection)
    job = queue.enqueue("math.sqrt", 9)

    class Worker(SimpleWorker):
        death_penalty_class = TimerDeathPenalty

    Worker([queue], connection=connection).work(burst=True)
    assert job.latest_result().return_value == 3.0


def refused(action, error, words):
    try:
        action()
    except redis.RedisError as seen:
        assert type(seen) is error and words in str(seen), repr(seen)
        return
    raise AssertionError(f"not refused: {words}")


@case
def logins_that_fail_as_exceptions():
    parts = urllib.parse.urlsplit(FREE)
    host, port = parts.hostname, parts.port
    for user, password in [("app", "nonsense"), ("app", parts.password[:-3] + "xyz"), ("nobody", parts.password)]:
        client = redis.Redis(host=host, port=port, username=user, password=password)
        refused(client.ping, redis.AuthenticationError, "invalid username-password pair")
    refused(redis.Redis(host=host, port=port, protocol=2).ping, redis.AuthenticationError, "Authentication required")


@case
def limits_of_free_rate_and_sockets_as_exceptions():
    client = redis.Redis.from_url(FREE)
    pipe = client.pipeline(transaction=False)
    for _ in range(3000):
        pipe.ping()
    replies = pipe.execute(raise_on_error=False)
    errors = [reply for reply in replies if reply is not True]
    # Neither a connection error, which would make the pool reconnect, nor one that is tried again.
    assert errors and all(type(e) is redis.ResponseError and "max requests limit exceeded" in str(e) for e in errors)
    time.sleep(0.1)
    assert client.ping()
    clients = [redis.Redis.from_url(FREE) for _ in range(60)]
    held = []
    try:
        for one in clients:
            connection = one.connection_pool.get_connection()
            held.append((one, connection))
        raise AssertionError("60 sockets fit into FREE")
    except redis.ConnectionError as seen:
        assert type(seen) is redis.ConnectionError and "max number of clients" in str(seen), repr(seen)
        assert 45 <= len(held) <= 50, len(held)
    finally:
        for one in clients:
            one.connection_pool.disconnect()


@case
def client_side_caching():
    version = redis.Redis.from_url(BIG).info("server")["redis_version"]
    if tuple(map(int, version.split(".")[:2])) < (7, 4):
        raise Skip(f"the driver caches from 7.4 on, this is {version}")
    client = redis.Redis.from_url(BIG, protocol=3, cache_config=redis.cache.CacheConfig(), decode_responses=True)
    other = redis.Redis.from_url(BIG)
    client.flushall()
    client.set("cached", "1")
    assert client.get("cached") == "1"
    cache = client.get_cache()
    assert cache.size == 1
    assert client.get("cached") == "1"
    other.set("cached", "2")
    deadline = time.monotonic() + 5
    while client.get("cached") != "2":
        assert time.monotonic() < deadline, "the invalidation did not come"
    client.close()


@case
def redis_cli_pipe_and_redis_benchmark():
    requests = b"".join(b"*3\r\n$3\r\nSET\r\n$%d\r\np:%d\r\n$1\r\nv\r\n" % (len(str(i)) + 2, i) for i in range(5000))
    redis.Redis.from_url(BIG).flushall()
    done = subprocess.run(["redis-cli", "--no-auth-warning", "-u", BIG, "--pipe"], input=requests, capture_output=True, timeout=60)
    assert b"errors: 0, replies: 5000" in done.stdout, done
    assert redis.Redis.from_url(BIG).dbsize() == 5000
    parts = urllib.parse.urlsplit(BIG)
    command = ["redis-benchmark", "-h", parts.hostname, "-p", str(parts.port), "--user", parts.username, "-a", parts.password]
    command += ["-q", "-n", "2000", "-c", "20", "-P", "4", "-t", "set,get,incr,lpush,rpop,sadd,hset,zadd,lrange_100,mset"]
    done = subprocess.run(command, capture_output=True, timeout=120, text=True)
    assert done.returncode == 0 and "rror" not in done.stdout + done.stderr, done
    assert done.stdout.count("requests per second") >= 10, done.stdout
    cli = ["redis-cli", "--no-auth-warning", "-u", BIG]
    for command, expected in [("set k v", "OK"), ("get k", "v"), ("type k", "string"), ("object encoding k", "embstr")]:
        done = subprocess.run(cli + command.split(), capture_output=True, timeout=20, text=True)
        assert done.stdout.strip() == expected, done
    # Interactive: one session that reads commands as they are typed, blank lines and all.
    typed = "set k 2\nincr k\nmulti\nincr k\nget k\nexec\n\nselect 3\ndbsize\nkeys *\n"
    done = subprocess.run(cli, input=typed, capture_output=True, timeout=20, text=True)
    lines = done.stdout.split()
    assert lines[:9] == ["OK", "3", "OK", "QUEUED", "QUEUED", "4", "4", "OK", "0"], done


@case
def redis_py_resp2():
    sync(BIG, 2)


@case
def redis_py_resp3():
    sync(BIG, 3)


@case
def asyncio_resp2():
    asyncio.run(aio(BIG, 2))


@case
def asyncio_resp3():
    asyncio.run(aio(BIG, 3))


@case
def limits_of_free_as_exceptions():
    oom(FREE)


LIBRARY = """#!lua name=suite
local function made(key) return 'fn:' .. key end
redis.register_function('keep', function(keys, args)
  redis.call('SET', made(keys[1]), args[1])
  return redis.call('GET', made(keys[1]))
end)
redis.register_function{
  function_name = 'seen',
  callback = function(keys) return redis.call('GET', made(keys[1])) end,
  flags = {'no-writes'},
}
"""


def functions(url, protocol):
    r = redis.Redis.from_url(url, protocol=protocol, decode_responses=True)
    r.flushall()
    assert r.function_load(LIBRARY, replace=True) == "suite"
    refused(lambda: r.function_load(LIBRARY), redis.ResponseError, "Library 'suite' already exists")
    assert r.fcall("keep", 1, "a", "b") == "b" and r.get("fn:a") == "b"
    assert r.fcall_ro("seen", 1, "a") == "b"
    refused(lambda: r.fcall_ro("keep", 1, "a", "c"), redis.ResponseError, "write flag")
    with r.pipeline(transaction=True) as pipe:
        assert pipe.fcall("keep", 1, "p", "q").get("fn:p").execute() == ["q", "q"]
    told = json.dumps(r.function_list(library="su*", withcode=True), default=sorted)
    assert json.dumps(LIBRARY) in told and '"keep"' in told and '"no-writes"' in told, told
    assert '"functions_count"' in json.dumps(r.function_stats())
    assert r.function_list("x*") == []
    assert r.function_delete("suite")
    refused(lambda: r.fcall("keep", 1, "a", "b"), redis.ResponseError, "Function not found")
    assert r.function_flush()


@case
def functions_resp2():
    functions(BIG, 2)


@case
def functions_resp3():
    functions(BIG, 3)


@case
def redis_cli_loads_a_library():
    cli = ["redis-cli", "--no-auth-warning", "-u", BIG]
    done = subprocess.run(cli + ["-x", "function", "load", "replace"], input=LIBRARY, capture_output=True, timeout=20, text=True)
    assert done.stdout.strip() == "suite", done
    done = subprocess.run(cli + ["fcall", "keep", "1", "a", "b"], capture_output=True, timeout=20, text=True)
    assert done.stdout.strip() == "b", done
    done = subprocess.run(cli + ["function", "flush"], capture_output=True, timeout=20, text=True)
    assert done.stdout.strip() == "OK", done


@case
def celery_runs_a_task():
    celery(BIG)


@case
def rq_runs_a_job():
    rq(BIG)


main()
