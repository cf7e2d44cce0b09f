"""pymongo, sync and async, three ways: straight to the server, as a tenant of `filter` isolation, of `database`.

The same steps run three ways and their results are compared value by value. Cases of two tenants, of limits and of
logins follow. Not compared, as it differs: the text of errors, sizes in statistics, and an empty collection, which under
`filter` isolation is listed only while it holds a document or an index of the tenant.
"""

import asyncio
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gridfs
import pymongo
import pymongo.errors
from bson import BSON, Decimal128, Int64, ObjectId, Regex, SON
from pymongo import DeleteOne, InsertOne, ReplaceOne, UpdateMany, UpdateOne
from pymongo.auth_oidc import OIDCCallback, OIDCCallbackResult
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from harness import READY, case, equal, main, tenant

DIRECT = READY["upstreams"]["mongodb"]
FREE = tenant("acme")["urls"]["mongodb"]
PRO = tenant("initech")["urls"]["mongodb"]
STARTER = tenant("globex")["urls"]["mongodb"]
BIG = tenant("umbrella")["urls"]["mongodb"]



def client(url, **options):
    return pymongo.MongoClient(url, serverSelectionTimeoutMS=20_000, **options)


def fresh(c, name):
    """A collection without documents or indexes, whatever an earlier case left there."""
    database = c.app
    database[name].drop()
    return database[name]


def patiently(call):
    """FREE allows 50 requests a second: who runs ahead waits, as its driver does not."""
    while True:
        try:
            return call()
        except pymongo.errors.OperationFailure as error:
            if error.code != 462:
                raise
            time.sleep(0.5)


def three_ways(steps):
    """Runs the steps against the server and as two tenants; all results are equal."""
    results = {}
    for way, url in (("direct", DIRECT), ("filter", FREE), ("database", PRO)):
        time.sleep(1 if way == "filter" else 0)
        with client(url) as c:
            results[way] = steps(c, way)
    equal(results["filter"], results["direct"])
    equal(results["database"], results["direct"])


def error_of(call):
    """Code and class of what a call raises."""
    try:
        call()
    except pymongo.errors.BulkWriteError as error:
        return [(e["index"], e["code"]) for e in error.details["writeErrors"]]
    except pymongo.errors.PyMongoError as error:
        return type(error).__name__, getattr(error, "code", None)
    return None


@case
def the_printed_strings_work():
    for t in READY["tenants"]:
        with client(t["urls"]["mongodb"]) as c:
            things = c.get_default_database().first
            things.delete_many({})
            things.insert_one({"_id": f"of {t['org_id']}", "n": 1})
            equal(things.find_one({"n": 1}), {"_id": f"of {t['org_id']}", "n": 1})
            equal(things.count_documents({}), 1)


@case
def documents_come_and_go_the_same_three_ways():
    def steps(c, way):
        people = fresh(c, "people")
        made = people.insert_one({"_id": 1, "name": "Ada", "tags": ["a", "b"], "n": Int64(5), "d": Decimal128("1.5")})
        seen = [made.inserted_id, people.find_one({"_id": 1})]
        people.insert_many([{"_id": i, "name": f"p{i}", "n": i, "in": {"a": i % 3}} for i in range(2, 12)])
        seen.append([d["_id"] for d in people.find({"n": {"$gt": 3}}).sort("_id", -1).limit(3)])
        seen.append(people.find_one({"name": Regex("^p7")}, {"name": 1, "_id": 0}))
        seen.append(people.find_one({"_id": 4}, {"in.a": 0}))
        seen.append(people.count_documents({"in.a": 1}))
        seen.append(people.estimated_document_count())
        seen.append(sorted(people.distinct("in.a")))
        r = people.update_one({"_id": 2}, {"$set": {"x": 1}, "$inc": {"n": 10}, "$push": {"l": {"$each": [1, 2]}}})
        seen.append((r.matched_count, r.modified_count, people.find_one({"_id": 2})))
        r = people.update_many({"in.a": 0}, [{"$set": {"y": {"$add": ["$n", 1]}}}])
        seen.append((r.matched_count, r.modified_count))
        r = people.update_one({"_id": 100}, {"$set": {"up": True}, "$setOnInsert": {"first": 1}}, upsert=True)
        seen.append((r.upserted_id, r.matched_count, people.find_one({"_id": 100})))
        r = people.replace_one({"_id": 3}, {"name": "replaced"})
        seen.append((r.modified_count, people.find_one({"_id": 3})))
        seen.append(people.find_one_and_update({"_id": 4}, {"$set": {"z": 1}}, return_document=True))
        seen.append(people.find_one_and_replace({"_id": 5}, {"k": 1}))
        seen.append(people.find_one_and_delete({"_id": 6}))
        seen.append(people.delete_one({"_id": 7}).deleted_count)
        seen.append(people.delete_many({"n": {"$gte": 9}}).deleted_count)
        seen.append(list(people.find().sort("_id", 1)))
        seen.append(error_of(lambda: people.insert_one({"_id": 1})))
        seen.append(error_of(lambda: people.update_one({"_id": 1}, {"$nope": {"a": 1}})))
        seen.append(error_of(lambda: people.find_one({"$nope": 1})))
        return seen

    three_ways(steps)


@case
def bulk_writes_are_the_same_three_ways():
    def steps(c, way):
        things = fresh(c, "bulk")
        r = things.bulk_write([
            InsertOne({"_id": 1, "a": 1}), InsertOne({"_id": 2, "a": 2}), UpdateOne({"_id": 1}, {"$set": {"b": 1}}),
            UpdateMany({}, {"$inc": {"a": 1}}), ReplaceOne({"_id": 9}, {"r": 1}, upsert=True), DeleteOne({"_id": 2}),
        ])
        seen = [{k: v for k, v in r.bulk_api_result.items()}, list(things.find().sort("_id", 1))]
        seen.append(error_of(lambda: things.insert_many([{"_id": 20}, {"_id": 1}, {"_id": 21}], ordered=True)))
        seen.append(error_of(lambda: things.insert_many([{"_id": 30}, {"_id": 1}, {"_id": 31}, {"_id": 9}], ordered=False)))
        seen.append([d["_id"] for d in things.find().sort("_id", 1)])
        unacknowledged = things.with_options(write_concern=WriteConcern(w=0))
        unacknowledged.insert_one({"_id": 50})
        for _ in range(100):
            if things.find_one({"_id": 50}):
                break
            time.sleep(0.05)
        seen.append(things.find_one({"_id": 50}))
        return seen

    three_ways(steps)


@case
def a_bulk_write_over_collections_keeps_what_is_not_refused():
    """The command of 8.0: by the client, over several collections."""
    def steps(c, way):
        one, other = fresh(c, "bulk_one"), fresh(c, "bulk_other")
        model = lambda ns, **fields: InsertOne(fields, namespace=f"app.{ns}")
        r = c.bulk_write([model("bulk_one", _id=1), model("bulk_other", _id=1),
                          UpdateOne({"_id": 1}, {"$set": {"a": 1}}, namespace="app.bulk_one"),
                          DeleteOne({"_id": 7}, namespace="app.bulk_other")], verbose_results=True)
        seen = [r.inserted_count, r.modified_count, r.deleted_count, one.find_one({}), other.find_one({})]
        for ordered in (True, False):
            try:
                c.bulk_write([model("bulk_one", _id=ordered), model("bulk_one", _id=1), model("bulk_other", _id=10 + ordered)], ordered=ordered)
            except pymongo.errors.ClientBulkWriteException as error:
                seen.append([(e["idx"], e["code"]) for e in error.write_errors])
        seen.append([d["_id"] for d in other.find().sort("_id", 1)])
        return seen

    three_ways(steps)
    with client(STARTER) as c:
        things = fresh(c, "bulk_refused")
        models = [InsertOne({"_id": 1}, namespace="app.bulk_refused"),
                  InsertOne({"_id": 2, "org_id": "initech"}, namespace="app.bulk_refused"),
                  InsertOne({"_id": 3}, namespace="app.bulk_refused"), InsertOne({"_id": 1}, namespace="app.bulk_refused")]
        for ordered, errors, left in ((False, [(1, 66), (3, 11000)], [1, 3]), (True, [(1, 66)], [1])):
            things.delete_many({})
            try:
                c.bulk_write(models, ordered=ordered)
                raise AssertionError("nothing was refused")
            except pymongo.errors.ClientBulkWriteException as error:
                equal([(e["idx"], e["code"]) for e in error.write_errors], errors)
            equal([d["_id"] for d in things.find().sort("_id", 1)], left)


@case
def aggregations_are_the_same_three_ways():
    def steps(c, way):
        orders, items = fresh(c, "orders"), fresh(c, "items")
        items.insert_many([{"_id": i, "sku": f"s{i}", "price": i * 2, "parent": i - 1} for i in range(6)])
        orders.insert_many([{"_id": i, "sku": f"s{i % 3}", "q": i, "when": i // 4} for i in range(12)])
        run = lambda pipeline, coll=orders: list(coll.aggregate(pipeline))
        return [
            run([{"$match": {"q": {"$gt": 2}}}, {"$group": {"_id": "$sku", "n": {"$sum": "$q"}}}, {"$sort": {"_id": 1}}]),
            run([{"$lookup": {"from": "items", "localField": "sku", "foreignField": "sku", "as": "i"}}, {"$sort": {"_id": 1}}, {"$limit": 2}]),
            run([{"$lookup": {"from": "items", "let": {"s": "$sku"}, "as": "i", "pipeline": [
                {"$match": {"$expr": {"$eq": ["$sku", "$$s"]}}}, {"$project": {"_id": 0, "price": 1}}]}}, {"$sort": {"_id": -1}}, {"$limit": 2}]),
            run([{"$graphLookup": {"from": "items", "startWith": "$parent", "connectFromField": "parent",
                                   "connectToField": "_id", "as": "up"}}, {"$match": {"_id": 5}},
                 {"$project": {"n": {"$size": "$up"}}}], items),
            run([{"$unionWith": {"coll": "items", "pipeline": [{"$project": {"sku": 1}}]}}, {"$count": "n"}]),
            run([{"$facet": {"a": [{"$match": {"q": 1}}], "b": [{"$count": "n"}]}}]),
            run([{"$project": {"all": "$$ROOT"}}, {"$sort": {"_id": 1}}, {"$limit": 1}]),
            run([{"$unwind": "$sku"}, {"$sortByCount": "$sku"}, {"$sort": {"_id": 1}}]),
            run([{"$replaceRoot": {"newRoot": {"k": {"$objectToArray": "$$ROOT"}}}}, {"$limit": 1}, {"$project": {"n": {"$size": "$k"}}}]),
            list(c.app.aggregate([{"$documents": [{"a": 1}, {"a": 2}]}, {"$match": {"a": 2}}])),
            sorted(d["_id"] for d in orders.aggregate([], batchSize=5)),
        ]

    three_ways(steps)


@case
def cursors_span_batches_three_ways():
    def steps(c, way):
        many = fresh(c, "many")
        many.insert_many([{"_id": i, "pad": "x" * 100} for i in range(300)])
        cursor = many.find({}, batch_size=50).sort("_id", 1)
        seen = [d["_id"] for d in cursor]
        cursor = many.find({}, batch_size=10)
        next(cursor)
        alive = cursor.alive and cursor.cursor_id != 0
        cursor.close()
        raw = b"".join(many.find_raw_batches({"_id": {"$lt": 3}}).sort("_id", 1))
        return [seen == list(range(300)), alive, len(raw)]

    three_ways(steps)


@case
def transactions_are_the_same_three_ways():
    def steps(c, way):
        accounts = fresh(c, "accounts")
        accounts.insert_many([{"_id": "a", "n": 10}, {"_id": "b", "n": 0}])

        def move(session):
            accounts.update_one({"_id": "a"}, {"$inc": {"n": -3}}, session=session)
            accounts.update_one({"_id": "b"}, {"$inc": {"n": 3}}, session=session)
            return accounts.find_one({"_id": "b"}, session=session)["n"]

        seen = []
        with c.start_session() as session:
            seen.append(session.with_transaction(move, read_concern=ReadConcern("snapshot"), write_concern=WriteConcern("majority")))
            seen.append(list(accounts.find().sort("_id", 1)))
            session.start_transaction()
            accounts.update_one({"_id": "a"}, {"$set": {"n": 999}}, session=session)
            seen.append(accounts.find_one({"_id": "a"})["n"])
            session.abort_transaction()
            seen.append(accounts.find_one({"_id": "a"})["n"])
            session.start_transaction()
            accounts.insert_one({"_id": "c"}, session=session)
            session.commit_transaction()
            seen.append(accounts.count_documents({}))
        return seen

    three_ways(steps)


@case
def change_streams_are_the_same_three_ways():
    def steps(c, way):
        things = fresh(c, "watched")
        things.insert_one({"_id": 0})
        seen = []
        with things.watch(max_await_time_ms=500) as stream:
            things.insert_one({"_id": 1, "a": 1})
            things.update_one({"_id": 1}, {"$set": {"a": 2}})
            things.delete_one({"_id": 1})
            deadline = time.monotonic() + 30
            while len(seen) < 3 and time.monotonic() < deadline:
                event = patiently(stream.try_next)
                if event is not None:
                    seen.append((event["operationType"], event["ns"], event["documentKey"], event.get("fullDocument"),
                                 (event.get("updateDescription") or {}).get("updatedFields")))
        return seen

    three_ways(steps)


@case
def gridfs_is_the_same_three_ways():
    def steps(c, way):
        for name in ("fs.files", "fs.chunks"):
            c.app[name].drop()
        bucket = gridfs.GridFSBucket(c.app)
        data = bytes(range(256)) * 4000
        file = patiently(lambda: bucket.upload_from_stream("a.bin", data, metadata={"k": 1}))
        seen = [bucket.open_download_stream(file).read() == data]
        seen.append([(f.filename, f.length, f.metadata) for f in bucket.find({"filename": "a.bin"})])
        bucket.delete(file)
        seen.append(c.app["fs.chunks"].count_documents({}))
        return seen

    three_ways(steps)


@case
def indexes_are_the_same_three_ways():
    def steps(c, way):
        things = fresh(c, "indexed")
        seen = [things.create_index("a"), things.create_index([("b", 1), ("c", -1)], unique=True)]
        things.insert_one({"_id": 1, "a": 1, "b": 1, "c": 1})
        seen.append(error_of(lambda: things.insert_one({"_id": 2, "b": 1, "c": 1})))
        seen.append(sorted((name, tuple(info["key"])) for name, info in things.index_information().items()))
        seen.append(list(things.find({"a": 1}).hint("a_1")))
        things.drop_index("a_1")
        seen.append(sorted(things.index_information()))
        things.drop_indexes()
        seen.append(sorted(things.index_information()))
        return seen

    three_ways(steps)


@case
def databases_and_collections_are_listed_as_the_tenant_knows_them():
    def steps(c, way):
        for name in c.app.list_collection_names() if way != "direct" else ["listed"]:
            c.app[name].drop()
        c.app.listed.insert_one({"_id": 1})
        seen = ["listed" in c.app.list_collection_names(), "app" in c.list_database_names()]
        stats = c.app.command("collStats", "listed")
        seen.append((stats["ns"], stats["count"]))
        seen.append(c.app.command("dbStats")["db"])
        c.app.listed.drop()
        seen.append("listed" in c.app.list_collection_names())
        return seen

    three_ways(steps)
    for url in (FREE, PRO):
        with client(url) as c:
            assert not {"admin", "local", "config", "dynabase"} & set(c.list_database_names()), c.list_database_names()


@case
def one_tenant_knows_nothing_of_another():
    for one, other in ((FREE, STARTER), (PRO, BIG)):
        with client(one) as a, client(other) as b:
            mine, theirs = fresh(a, "secret"), fresh(b, "secret")
            mine.insert_one({"_id": ObjectId(), "owner": "one", "v": 1})
            theirs.insert_one({"_id": ObjectId(), "owner": "other", "v": 1})
            equal([d["owner"] for d in mine.find()], ["one"])
            equal([d["owner"] for d in theirs.find()], ["other"])
            equal(mine.count_documents({}), 1)
            equal(mine.distinct("owner"), ["one"])
            equal(mine.update_many({}, {"$set": {"touched": 1}}).matched_count, 1)
            equal([d["owner"] for d in mine.aggregate([{"$unionWith": "secret"}])], ["one", "one"])
            equal(theirs.find_one({"touched": 1}), None)
            equal(mine.delete_many({}).deleted_count, 1)
            equal(theirs.count_documents({}), 1)


@case
def cursors_and_sessions_mean_nothing_to_another_tenant():
    for one, other in ((FREE, STARTER), (PRO, BIG)):
        with client(one) as a, client(other) as b:
            many = fresh(a, "many")
            many.insert_many([{"n": i} for i in range(20)])
            opened = a.app.command("find", "many", batchSize=2)
            number = opened["cursor"]["id"]
            assert number > 0
            try:
                b.app.command({"getMore": Int64(number), "collection": "many"})
                raise AssertionError("another tenant read a cursor")
            except pymongo.errors.OperationFailure as error:
                equal(error.code, 43)
            killed = b.app.command({"killCursors": "many", "cursors": [Int64(number)]})
            equal(killed["cursorsKilled"], [])
            with a.start_session() as session, a.start_session() as _:
                session.start_transaction()
                a.app.many.insert_one({"n": 100}, session=session)
                lsid = session.session_id
                aborted = error_of(lambda: b.admin.command(
                    {"abortTransaction": 1, "lsid": lsid, "txnNumber": Int64(1), "autocommit": False}))
                assert aborted is not None, "another tenant aborted a transaction"
                session.commit_transaction()
            equal(a.app.many.count_documents({"n": 100}), 1)


@case
def the_server_itself_keeps_database_tenants_apart():
    with client(PRO) as c, client(BIG) as b, client(DIRECT) as admin:
        c.app.wall.insert_one({"_id": ObjectId()})
        b.app.wall.insert_one({"_id": ObjectId()})
        c.other.wall.insert_one({"_id": ObjectId()})
        users = {u["user"]: u["roles"] for u in admin.admin.command("usersInfo")["users"] if u["user"].startswith("t_")}
        assert len(users) >= 2, users
        for user, roles in users.items():
            assert roles and all(r["db"].startswith(f"{user}_") and r["role"] in ("readWrite", "dbAdmin") for r in roles), roles
        homes = {r["db"] for roles in users.values() for r in roles}
        names = set(admin.list_database_names())
        assert sum(1 for home in homes if home.endswith("_other") and home in names) == 1, homes
        c.drop_database("other")
        assert "other" not in c.list_database_names()
        c.app.wall.drop()
        b.app.wall.drop()


@case
def what_is_not_for_tenants_is_refused():
    for url in (FREE, PRO):
        with client(url) as c:
            for command, code in (
                ({"shutdown": 1}, 13), ({"createUser": "x", "pwd": "x", "roles": []}, 13), ({"fsync": 1}, 13),
                ({"currentOp": 1}, 13), ({"noSuchThing": 1}, 59), ({"configureFailPoint": "x", "mode": "off"}, 59),
                ({"getLog": "global"}, 13),
            ):
                equal(error_of(lambda: c.admin.command(command)), ("OperationFailure", code))
            for database in ("admin", "local", "config"):
                assert error_of(lambda: list(c[database]["oplog.rs"].find().limit(1))) is not None, database
            # Usable afterwards.
            equal(c.admin.command("ping")["ok"], 1.0)


@case
def tools_get_their_answers():
    for url in (FREE, PRO):
        with client(url) as c:
            equal(c.admin.command("buildInfo")["ok"], 1.0)
            equal(c.admin.command("getParameter", "*")["enableTestCommands"], False)
            equal(c.admin.command("connectionStatus")["authInfo"]["authenticatedUsers"][0]["user"], "app")
            equal(c.admin.command("getCmdLineOpts")["argv"], ["dynabase"])
            for command in ("hostInfo", "whatsmyuri", "listCommands", "serverStatus", "getDefaultRWConcern"):
                equal(c.admin.command(command)["ok"], 1.0)
            hello = c.admin.command("hello")
            # One node of a set of its own: of the server behind nothing is told.
            address = url.split("@")[1].split("/")[0]
            equal([hello[key] for key in ("setName", "hosts", "me", "primary", "secondary", "isWritablePrimary")],
                  ["rs0", [address], address, address, False, True])
            behind = DIRECT.split("@")[1].split("/")[0]
            for hidden in ("msg", "topologyVersion", "electionId", "lastWrite", "passives", "arbiters"):
                assert hidden not in hello, hidden
            assert behind not in str(hello) and "secantus" not in str(hello), hello


@case
def strings_with_and_without_a_replica_set_work():
    for org in ("acme", "initech"):
        bare = tenant(org)["urls"]["mongodb"].split("/app?")[0]
        string = lambda *options: f"{bare}/app?" + "&".join(("authMechanism=PLAIN", *options))
        for options, sees in (
            (["replicaSet=rs0"], "ReplicaSetWithPrimary"),
            (["replicaSet=rs0", "directConnection=true"], "Single"),
            (["directConnection=true"], "Single"),
            ([], "ReplicaSetWithPrimary"),
            (["loadBalanced=true"], "LoadBalanced"),
        ):
            with client(string(*options)) as c:
                things = c.app.forms
                things.insert_one({"way": len(options)})
                equal(things.count_documents({}), 1)
                with c.start_session() as session:
                    session.with_transaction(lambda s: things.update_many({}, {"$set": {"in": True}}, session=s))
                equal([d["in"] for d in things.find()], [True])
                with things.watch(max_await_time_ms=200) as stream:
                    things.insert_one({"_id": ObjectId()})
                    equal(next(stream)["operationType"], "insert")
                things.delete_many({})
                equal(c.topology_description.topology_type_name, sees)
        # Another name is not ours, and the driver says so itself.
        for options, words in ((["replicaSet=other"], "other"), (["replicaSet=other", "directConnection=true"], "rs0")):
            began = time.monotonic()
            try:
                with pymongo.MongoClient(string(*options), serverSelectionTimeoutMS=1500) as c:
                    c.app.forms.find_one()
                raise AssertionError("another set was found")
            except pymongo.errors.ServerSelectionTimeoutError as error:
                assert words in str(error), error
            assert time.monotonic() - began < 30


@case
def other_strings_work_too():
    for url in (FREE, PRO):
        bare, token = url.split("/app?")[0], tenant("initech")["token"]
        for form in (
            f"{bare}/?authMechanism=PLAIN&authSource=$external&maxPoolSize=2",
            f"{bare}/?authMechanism=PLAIN&loadBalanced=true",
            f"{url}&compressors=zstd,zlib,snappy",
            f"{url}&retryWrites=false",
        ):
            with client(form) as c:
                c.app.forms.insert_one({"big": "x" * 5000})
                assert c.app.forms.find_one({})["big"] == "x" * 5000
                c.app.forms.delete_many({})
        assert token


@case
def oidc_with_a_callback_works():
    asked = []

    class Token(OIDCCallback):
        def fetch(self, context):
            asked.append(1)
            return OIDCCallbackResult(access_token=tenant("initech")["token"])

    address = PRO.split("@")[1].split("/")[0]
    options = {"authMechanism": "MONGODB-OIDC", "authMechanismProperties": {"OIDC_CALLBACK": Token()}}
    with pymongo.MongoClient(f"mongodb://{address}/?directConnection=true", serverSelectionTimeoutMS=20_000, **options) as c:
        c.app.oidc.insert_one({"_id": ObjectId()})
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: c.app.oidc.count_documents({}), range(20)))
        c.app.oidc.drop()
    equal(len(asked), 1)


@case
def a_wrong_login_says_how_to_do_it():
    address = PRO.split("@")[1].split("/")[0]
    for url, word in (
        (f"mongodb://app:nonsense@{address}/app?authMechanism=PLAIN&directConnection=true", "Authentication failed"),
        (f"mongodb://app:secret@{address}/app?directConnection=true", "authMechanism=PLAIN"),
    ):
        try:
            with client(url) as c:
                c.app.x.find_one()
            raise AssertionError("it got in")
        except pymongo.errors.OperationFailure as error:
            equal(error.code, 18)
            assert word in str(error), error
    with client(f"mongodb://{address}/?directConnection=true") as c:
        equal(error_of(lambda: c.app.x.find_one()), ("OperationFailure", 13))


@case
def a_free_tenant_with_ten_threads_is_served_in_turn():
    # Two operations at a time and 50 requests a second: everybody gets through, none is thrown out.
    with client(FREE) as c:
        things = fresh(c, "crowd")
        things.insert_one({"_id": 1})
        time.sleep(2)
        errors = []

        def work(_):
            try:
                return things.find_one({"_id": 1}) is not None
            except pymongo.errors.OperationFailure as error:
                errors.append(error.code)
                return True

        with ThreadPoolExecutor(10) as threads:
            assert all(threads.map(work, range(60)))
        assert set(errors) <= {462}, errors


@case
def too_many_requests_get_462_and_the_pool_stays():
    with client(FREE) as c:
        things = fresh(c, "rate")
        refused = []

        def work(_):
            for _ in range(100):
                try:
                    c.app.command("count", "rate")
                except pymongo.errors.OperationFailure as error:
                    refused.append(error)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(4)))
        # The driver repeats what it may; 400 requests at 50 a second are more than that.
        assert refused, "400 requests at once are over 50 a second"
        for error in refused:
            equal(error.code, 462)
            assert error.has_error_label("SystemOverloadedError") and error.has_error_label("RetryableError")
        time.sleep(2.5)
        equal(things.count_documents({}), 0)


@case
def a_slow_operation_ends_with_50_and_others_go_on():
    with client(FREE) as c:
        things = fresh(c, "slow")
        things.insert_many([{"n": i} for i in range(300)])
        began = time.monotonic()
        # Three joins of everything with everything take longer than FREE's five seconds.
        join = {"$lookup": {"from": "slow", "pipeline": [], "as": "x"}}
        heavy = [join, {"$unwind": "$x"}, join, {"$unwind": "$x"}, {"$group": {"_id": None, "n": {"$sum": 1}}}]
        code = error_of(lambda: list(things.aggregate(heavy)))
        assert code is None or code[1] == 50, code
        assert time.monotonic() - began < 15
        time.sleep(1)
        equal(things.count_documents({}), 300)


@case
async def async_pymongo_works():
    for url in (FREE, PRO):
        async with pymongo.AsyncMongoClient(url, serverSelectionTimeoutMS=20_000) as c:
            things = c.app.asynchronous
            await things.delete_many({})
            await things.insert_many([{"_id": i} for i in range(30)])
            equal([d["_id"] async for d in things.find({}, batch_size=10).sort("_id", 1)], list(range(30)))
            found = await asyncio.gather(*(things.find_one({"_id": i}) for i in range(10)))
            equal([d["_id"] for d in found], list(range(10)))
            async with c.start_session() as session:
                async with await session.start_transaction():
                    await things.insert_one({"_id": 100}, session=session)
            equal(await things.count_documents({}), 31)


@case
def a_client_that_vanishes_takes_its_transaction_along():
    with client(PRO) as watcher:
        things = fresh(watcher, "left")
        things.insert_one({"_id": 1, "n": 0})
        c = client(PRO)
        session = c.start_session()
        session.start_transaction()
        c.app.left.update_one({"_id": 1}, {"$set": {"n": 1}}, session=session)
        # Its sockets go, without a word.
        c._topology._servers  # the pools live there
        for server in c._topology._servers.values():
            server.pool.reset()
        deadline = time.monotonic() + 20
        while True:
            try:
                things.update_one({"_id": 1}, {"$set": {"n": 2}})
                break
            except pymongo.errors.OperationFailure:
                assert time.monotonic() < deadline, "the transaction still holds its locks"
                time.sleep(0.2)
        equal(things.find_one({"_id": 1})["n"], 2)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@case
def over_tls_it_is_the_same_and_a_stranger_certificate_is_refused():
    """Another dynabase of the same installation, with certificates."""
    text = (Path(sys.argv[1]).parent / "data/dynabase.toml").read_text()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name in ("server", "stranger"):
            subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                            "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
                            "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.crt"], check=True, capture_output=True)
        port = free_port()
        text = re.sub(r'^(postgres|redis|http) = "127.0.0.1:\d+"', lambda m: f'{m[1]} = "127.0.0.1:{free_port()}"', text, flags=re.M)
        text = re.sub(r'^mongodb = "127.0.0.1:\d+"', f'mongodb = "127.0.0.1:{port}"', text, flags=re.M)
        text = re.sub(r'^listen = "127.0.0.1:\d+"', f'listen = "127.0.0.1:{free_port()}"', text, flags=re.M)
        text = text.replace('tiers = "tiers.toml"', f'tiers = "{Path(sys.argv[1]).parent}/data/tiers.toml"')
        text += f'\n[tls]\ncert_file = "{folder}/server.crt"\nkey_file = "{folder}/server.key"\n'
        (folder / "dynabase.toml").write_text(text)
        (folder / "dynabase.toml").chmod(0o600)
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen([os.environ["DYNABASE_BIN"], "serve", "--config", folder / "dynabase.toml"], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 30
            while b"listening for MongoDB" not in (folder / "log").read_bytes():
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-400:]
                time.sleep(0.05)
            for org in ("globex", "initech"):
                bare = f"mongodb://app:{tenant(org)['token']}@localhost:{port}/app?authMechanism=PLAIN&directConnection=true"
                trusted = f"{bare}&tls=true&tlsCAFile={folder}/server.crt"
                with client(trusted) as c:
                    things = fresh(c, "secure")
                    things.insert_many([{"_id": i, "pad": "x" * 10_000} for i in range(300)])
                    equal([d["_id"] for d in things.find({}, batch_size=50).sort("_id", 1)], list(range(300)))
                    with c.start_session() as session, session.start_transaction():
                        things.insert_one({"_id": 1000}, session=session)
                    equal(things.count_documents({}), 301)
                    # The same documents without TLS, through the other process.
                    with client(tenant(org)["urls"]["mongodb"]) as plain:
                        equal(plain.app.secure.count_documents({}), 301)
                    things.drop()
                for wrong in (f"{bare}&tls=true&tlsCAFile={folder}/stranger.crt", bare):
                    try:
                        with pymongo.MongoClient(wrong, serverSelectionTimeoutMS=2000) as c:
                            c.app.secure.find_one()
                        raise AssertionError("it got in")
                    except pymongo.errors.ServerSelectionTimeoutError:
                        pass
        finally:
            process.terminate()
            process.wait(20)


main()
