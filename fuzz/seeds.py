#!/usr/bin/env python3
"""Writes the seed corpus: small, whole messages of every kind, from which the fuzzer starts. Run from anywhere."""

import struct
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"


def i16(n):
    return n.to_bytes(2, "big", signed=True)


def i32(n):
    return n.to_bytes(4, "big", signed=True)


def z(text):
    return text.encode() + b"\0"


def packet(code, body=b""):
    return i32(len(body) + 8) + i32(code) + body


def message(kind, body=b""):
    return kind.encode() + i32(len(body) + 4) + body


def login(minor=0, **parameters):
    return packet(3 << 16 | minor, b"".join(z(k) + z(v) for k, v in parameters.items()) + b"\0")


STARTUP = {
    "ssl": packet(80877103),
    "gss": packet(80877104),
    "cancel": packet(80877102, i32(7) + b"abcd"),
    "cancel-long": packet(80877102, i32(7) + bytes(range(32))),
    "plain": login(user="app", database="app"),
    "options": login(user="app", database="app", options="-c search_path=a\\ b --lock_timeout=5 -c dynabase.pool_mode=session",
                     client_encoding="UTF8", application_name="suite"),
    "newer": login(2, user="app", **{"_pq_.command": "1"}),
    "replication": login(user="app", replication="database"),
    "behind-ssl": packet(80877103) + login(user="app"),
    "version-2": packet(2 << 16),
}
FRONTEND = {
    "query": message("Q", z("SELECT 1; BEGIN; COMMIT")),
    "prepared": message("P", z("s1") + z("SELECT $1::int") + i16(1) + i32(23)) + message("D", b"S" + z("s1"))
    + message("B", z("") + z("s1") + i16(1) + i16(1) + i16(1) + i32(4) + i32(7) + i16(0)) + message("E", z("") + i32(0))
    + message("S"),
    "unnamed": message("P", z("") + z("SELECT 1") + i16(0)) + message("B", z("") + z("") + i16(0) * 3)
    + message("D", b"P" + z("")) + message("E", z("") + i32(1)) + message("C", b"S" + z("")) + message("H") + message("S"),
    "copy": message("d", b"1\tx\n") + message("c") + message("f", z("no")) + message("S"),
    "password": message("p", z("eyJhbGciOiJIUzI1NiJ9.e30.AA")),
    "sasl": message("p", z("OAUTHBEARER") + i32(30) + b"n,,\x01auth=Bearer eyJ.e30.AA\x01\x01"),
    "call": message("F", i32(1) + i16(0) * 2 + i16(0)),
    "leave": message("X"),
    "pins": b"".join(message("Q", z(text)) for text in [
        "LISTEN c", "SELECT pg_advisory_lock(1)", "CREATE TEMP TABLE t (a int)", "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
        "PREPARE p AS SELECT 1", "SET search_path = x", "/* LISTEN */ SELECT '$$' -- x", "SELECT $a$ DISCARD ALL $a$"]),
}
BACKEND = {
    "login": message("R", i32(0)) + message("S", z("TimeZone") + z("UTC")) + message("K", i32(9) + b"abcd") + message("Z", b"I"),
    "sasl": message("R", i32(10) + z("SCRAM-SHA-256") + b"\0") + message("R", i32(11) + b"r=abc,s=QUJD,i=4096"),
    "rows": message("T", i16(1) + z("a") + i32(0) + i16(0) + i32(23) + i16(4) + i32(-1) + i16(0))
    + message("D", i16(1) + i32(1) + b"7") + message("C", z("SELECT 1")) + message("Z", b"T"),
    "extended": message("1") + message("2") + message("t", i16(1) + i32(23)) + message("n") + message("s") + message("3") + message("Z", b"I"),
    "error": message("E", b"S" + z("ERROR") + b"V" + z("ERROR") + b"C" + z("22012") + b"M" + z("division by zero") + b"\0") + message("Z", b"E"),
    "no-code": message("E", b"M" + z("odd") + b"\0"),
    "copy": message("G", b"\0" + i16(1) + i16(0)) + message("H", b"\0" + i16(0)) + message("d", b"x") + message("c"),
    "async": message("N", b"S" + z("NOTICE") + b"C" + z("00000") + b"M" + z("hear") + b"\0") + message("A", i32(3) + z("ch") + z("payload")),
    "newer": message("v", i32(196608) + i32(1) + z("_pq_.x")),
}
# Pairs of (act, detail): see fuzz_targets/ledger.rs.
LEDGER = {
    "simple": bytes([0, 6, 3, 4, 3, 7, 5, 0]),
    "extended": bytes([0, 0, 0, 1, 0, 3, 0, 5, 3, 0, 3, 1, 3, 7, 5, 0]),
    "error": bytes([0, 0, 0, 1, 0, 5, 3, 10, 5, 0]),
    "copy": bytes([0, 3, 0, 5, 3, 11, 7, 0, 0, 5, 3, 7, 5, 0]),
    "invented": bytes([0, 18, 6, 0, 0, 26, 6, 0]),
    **{f"text-{name}": data[5:] for name, data in FRONTEND.items()},
}
# Acts of two clients and two servers: see src/front/postgres/conversation/script.rs.
CONVERSATION = {
    "simple": bytes([0, 0, 0, 0, 100, 0]),
    "prepared": bytes([0, 0, 2, 1, 1, 4, 1, 5, 8]) + bytes([100, 0]) * 4,
    "two-clients": bytes([1, 2, 0, 6, 128, 7, 100, 0, 228, 0, 2, 1, 1, 130, 1, 1, 8, 136, 100, 0, 228, 0, 100, 0, 228, 0]),
    "wiped": bytes([0, 0, 2, 1, 0, 8, 100, 0, 100, 0, 0, 16, 4, 1, 8]) + bytes([100, 0]) * 4,
    "copy": bytes([0, 0, 0, 12, 100, 0, 3, 7, 100, 0, 100, 0]),
    "failed": bytes([0, 0, 2, 1, 1, 4, 1, 5, 8, 100, 7, 100, 0, 100, 0]),
    "raw": bytes([0, 0, 120, 14]) + message("Q", z("SELECT 1")) + bytes([121, 6]) + message("Z", b"I"),
}
TOKEN = {
    "good": b'{"alg":"HS256","typ":"JWT"}\n{"iss":"https://issuer.invalid/auth/v1","aud":"authenticated","exp":2000000,'
    b'"sub":"11111111-2222-4333-8444-555555555555","session_id":"x","role":"authenticated","org_id":"acme"}',
    "none": b"eyJhbGciOiJub25lIn0.e30.",
    "keys": b'{"keys":[{"kty":"EC","crv":"P-256","alg":"ES256","kid":"k","x":"AA","y":"AA"},{"kty":"RSA","kid":"r","n":"AQ","e":"AQAB"}]}',
}
ROOT = HERE.parent
CONFIGURATION = {name: (ROOT / "config" / name).read_bytes() for name in ["tiers.toml", "dynabase.toml"]}



def request(line):
    words = line.encode().split(b" ")
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


LINES = ["GET k", "MSET a 1 b 2", "ZUNIONSTORE d 2 a b WEIGHTS 1 2", "XREADGROUP GROUP g c COUNT 1 STREAMS a b > >",
         "SORT k BY w_* GET # GET v_*->f STORE d", "EVAL s 2 a b c", "GEORADIUS k 1 2 3 m STORE d", "BITOP AND d a b",
         "XGROUP CREATE s g $", "BLPOP a b 0", "LMPOP 9 a LEFT"]
REWRITE = {line.split()[0].lower(): request(line) for line in LINES}
RESP = {
    **{name: bytes([7]) + data for name, data in REWRITE.items()},
    "inline": b"\1SET a \"b c\"\r\n",
    "keys": b"\1*2\r\n$7\r\norg:a:k\r\n$7\r\norg:b:k\r\n",
    "streams": b"\1%1\r\n$7\r\norg:a:s\r\n*1\r\n*2\r\n$3\r\n1-1\r\n*2\r\n$1\r\nf\r\n$1\r\nv\r\n",
    "push": b"\1>3\r\n$7\r\nmessage\r\n$7\r\norg:a:c\r\n$1\r\nx\r\n",
    "attribute": b"\1|1\r\n+ttl\r\n:1\r\n~2\r\n:1\r\n_\r\n",
    "error": b"\1-NOGROUP No such key 'org:a:k'\r\n",
}

VERSION = b'{"querySet":1,"identity":1,"ts":"AAAAAAAAAAA="}'
CONVEX = {
    "connect": b'{"sessionId":"s","maxObservedTimestamp":"AAAAAAAAAAA=","connectionCount":1,"lastCloseReason":null,"type":"Connect"}',
    "authenticate": b'{"type":"Authenticate","baseVersion":0,"tokenType":"User","value":"a.b.c"}',
    "queries": b'{"type":"ModifyQuerySet","baseVersion":0,"newVersion":1,"modifications":[{"type":"Add","queryId":0,'
    b'"udfPath":"m:l","args":[{"a":1}]},{"queryId":2,"type":"Remove"}]}',
    "mutation": b'{"args":[{"orgId":"b"}],"componentPath":null,"requestId":3,"type":"Mutation","udfPath":"m:s"}',
    "arguments": b'[{"orgId":"b","x":{"y":["\\"",1]}}]',
    "object": b'{"a":{}}',
    "transition": b'{"type":"Transition","startVersion":' + VERSION + b',"endVersion":' + VERSION + b',"modifications":[]}',
    "chunk": b'{"type":"TransitionChunk","chunk":"{\\"type\\":\\"Tra","partNumber":0,"totalParts":2,"transitionId":"x"}',
    "answer": b'{"type":"MutationResponse","requestId":3,"success":false,"result":"no","ts":null,"logLines":[]}',
}



def bson(fields):
    """A BSON document; str, int, bool, float, None, dict and list are enough."""
    out = b""
    for key, value in fields.items():
        name = key.encode() + b"\0"
        match value:
            case bool():
                out += b"\x08" + name + bytes([value])
            case int():
                out += b"\x10" + name + value.to_bytes(4, "little", signed=True)
            case float():
                out += b"\x01" + name + struct.pack("<d", value)
            case str():
                text = value.encode() + b"\0"
                out += b"\x02" + name + len(text).to_bytes(4, "little") + text
            case None:
                out += b"\x0a" + name
            case dict():
                out += b"\x03" + name + bson(value)
            case list():
                out += b"\x04" + name + bson({str(i): item for i, item in enumerate(value)})
    return (len(out) + 5).to_bytes(4, "little") + out + b"\0"


REQUESTS = {
    "find": {"find": "c", "filter": {"a": 1, "org_id": "acme1", "$or": [{"b": {"$gt": 1}}]}, "projection": {"org_id": 1}},
    "expr": {"find": "c", "filter": {"$expr": {"$gt": [{"$toInt": "$ssn"}, 1]}}, "collation": {"locale": "en", "strength": 1}},
    "join": {"aggregate": "c", "cursor": {}, "pipeline": [
        {"$match": {"a": 1}}, {"$lookup": {"from": "d", "localField": "a", "foreignField": "b", "as": "x"}},
        {"$unionWith": {"coll": "e", "pipeline": [{"$match": {"$expr": {"$toInt": "$a"}}}]}}, {"$facet": {"y": [{"$unionWith": "d"}]}}]},
    "merge": {"aggregate": "c", "cursor": {}, "pipeline": [{"$graphLookup": {
        "from": "d", "startWith": "$a", "connectFromField": "a", "connectToField": "b", "as": "x"}}, {"$merge": {"into": "e", "on": "_id"}}]},
    "stream": {"aggregate": "c", "cursor": {}, "pipeline": [{"$changeStream": {"fullDocument": "updateLookup"}}, {"$match": {"a": 1}}]},
    "insert": {"insert": "c", "documents": [{"a": 1}, {"org_id": ["acme-1", "acme1"]}], "ordered": False},
    "update": {"update": "c", "updates": [{"q": {"a": 1}, "u": {"$rename": {"a": "org_id"}}, "upsert": True}, {"q": {}, "u": {"a": 1}}]},
    "piped": {"findAndModify": "c", "query": {"a": 1}, "update": [{"$set": {"org_id": "acme1"}}], "fields": {"a": 1}},
    "bulk": {"bulkWrite": 1, "ops": [{"delete": 0, "filter": {}, "multi": True}], "nsInfo": [{"ns": "app.c"}], "$db": "admin"},
    "index": {"createIndexes": "c", "indexes": [{"key": {"a": 1}, "name": "a_1", "unique": True, "sparse": True}]},
    "explain": {"explain": {"count": "c", "query": {"a": 1}}, "verbosity": "allPlansExecution"},
    "more": {"getMore": 1, "collection": "c", "maxTimeMS": 1.0, "batchSize": None},
}
REQUESTS = {name: bson(request if "$db" in request else request | {"$db": "app"}) for name, request in REQUESTS.items()}
MONGO_REWRITE = {
    **{f"{name}-{how}": bytes([how]) + data for name, data in REQUESTS.items() for how in (2, 3)},
    **{f"made-{n}": bytes([n & 1]) + bytes((n * 37 + i * i * 11) % 256 for i in range(120)) for n in range(8)},
    "section": bytes([2]) + bson({"insert": "c", "$db": "app"}) + bson({"a": 1}) + bson({"org_id": "acme1"}),
}
MONGO_CODEC = {**REQUESTS, "empty": bson({}), "two": bson({"a": 1.5}) + bson({"b": None})}


def frame(first, payload, mask=b"\1\2\3\4"):
    size = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + len(payload).to_bytes(2, "big")
    return bytes([first]) + size + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))


WEBSOCKET = {
    "binary": frame(0x82, b"hello"),
    "parts": frame(0x02, b"hel") + frame(0x89, b"there?") + frame(0x00, b"l") + frame(0x80, b"o") + frame(0x88, b""),
    "text": frame(0x81, b"hello"),
    "medium": frame(0x82, bytes(range(200))),
    "too-long": b"\x82\xff" + (1 << 40).to_bytes(8, "big") + b"\0\0\0\0",
    "not-masked": b"\x82\5hello",
    "compressed": frame(0xC2, b"hello"),
    "close": frame(0x88, b"\x03\xe8bye"),
}

LIBRARY = {
    "plain": b"#!lua name=lib\nlocal function f(keys,args) for i=1,3 do redis.call('INCR',keys[1]) end return args[1] end\n"
             b"redis.register_function('f',f)\n",
    "named": b"#!LUA  'NAME=lib' \nredis.register_function{function_name='f',callback=function() return [==[ ]] do ]==] end,flags={'no-writes'}}",
    "shadowed": b"#!lua name=lib\nlocal j=cjson while false do end --[[ end ]] return ' dynabase_tick();'",
    "broken": b"#!lua name=lib\nend repeat until",
}

SEEDS = {"redis_library": LIBRARY, "websocket": WEBSOCKET, "convex": CONVEX, "mongo_codec": MONGO_CODEC, "mongo_rewrite": MONGO_REWRITE, "startup": STARTUP, "frontend": FRONTEND, "backend": BACKEND, "ledger": LEDGER, "configuration": CONFIGURATION,
         "conversation": CONVERSATION, "token": TOKEN, "resp": RESP, "redis_rewrite": REWRITE}
for target, seeds in SEEDS.items():
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in seeds.items():
        (folder / name).write_bytes(data)
print(*(f"{target}: {len(seeds)} seeds" for target, seeds in SEEDS.items()), sep="\n")
