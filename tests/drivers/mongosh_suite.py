"""mongosh, MongoDB's own shell, three ways: straight to the server, as a tenant of `filter` isolation, of `database`.

What a person types, by `--eval` and on standard input; the answers are compared with the server's own.
"""

import json
import os
import pty
import re
import select
import subprocess
import time

from harness import READY, case, equal, main, tenant

SHELL = os.environ["MONGOSH"]
DIRECT = READY["upstreams"]["mongodb"].replace("/?", "/app?authSource=admin&")
FILTER = tenant("globex")["urls"]["mongodb"]
DATABASE = tenant("initech")["urls"]["mongodb"]
SECONDS = 60


def shell(url, script, *options):
    """Runs a script in a shell of its own; gives what it prints, as JSON."""
    done = subprocess.run([SHELL, url, "--quiet", "--norc", *options, "--eval", script], capture_output=True, text=True,
                          timeout=SECONDS, env={**os.environ, "HOME": os.environ.get("HOME", "/tmp"), "NO_COLOR": "1"})
    assert done.returncode == 0, (done.stdout + done.stderr)[-600:]
    return done.stdout


def three_ways(script):
    """The script's answers are equal three ways; gives them."""
    answers = {way: json.loads(shell(url, script, "--json=relaxed"))
               for way, url in (("direct", DIRECT), ("filter", FILTER), ("database", DATABASE))}
    equal(answers["filter"], answers["direct"])
    equal(answers["database"], answers["direct"])
    return answers["direct"]


@case
def show_dbs_and_collections_show_the_tenants_own():
    for url in (FILTER, DATABASE):
        shell(url, "db.shown.drop(); db.shown.insertOne({a: 1})")
        names = [line.split()[0] for line in shell(url, "show dbs").splitlines() if line.strip()]
        equal(names, ["app"])
        assert "shown" in shell(url, "show collections").split()
        shell(url, "db.shown.drop()")


@case
def documents_are_written_and_read_the_same_three_ways():
    told = three_ways("""
        db.shell.drop();
        const made = db.shell.insertOne({_id: 1, name: 'Ada', n: NumberLong('5')});
        const many = db.shell.insertMany([{_id: 2, n: 1}, {_id: 3, n: 2}]);
        ({made, many, one: db.shell.findOne({_id: 1}), some: db.shell.find({n: {$lt: 3}}).sort({_id: -1}).toArray(),
          updated: db.shell.updateMany({}, {$inc: {n: 1}}), count: db.shell.countDocuments(),
          sum: db.shell.aggregate([{$group: {_id: null, n: {$sum: '$n'}}}]).toArray(),
          distinct: db.shell.distinct('n').length, index: db.shell.createIndex({n: 1}),
          indexes: db.shell.getIndexes().map(i => i.name), deleted: db.shell.deleteMany({n: {$gt: 2}}),
          left: db.shell.find().toArray()})
    """)
    equal([d["_id"] for d in told["some"]], [3, 2])
    equal(told["one"], {"_id": 1, "name": "Ada", "n": 5})


@case
def transactions_work_in_the_shell_three_ways():
    told = three_ways("""
        db.moved.drop();
        db.moved.insertMany([{_id: 'a', n: 10}, {_id: 'b', n: 0}]);
        const s = db.getMongo().startSession();
        const moved = s.getDatabase('app').moved;
        s.startTransaction();
        moved.updateOne({_id: 'a'}, {$inc: {n: -3}});
        moved.updateOne({_id: 'b'}, {$inc: {n: 3}});
        const outside = db.moved.findOne({_id: 'b'}).n;
        s.commitTransaction();
        s.endSession();
        ({outside, after: db.moved.find().sort({_id: 1}).toArray()})
    """)
    equal(told, {"outside": 0, "after": [{"_id": "a", "n": 7}, {"_id": "b", "n": 3}]})


@case
def errors_are_the_servers_own():
    script = """
        const code = f => { try { f(); return null } catch (e) { return e.code } };
        db.wrong.drop();
        db.wrong.insertOne({_id: 1});
        [code(() => db.wrong.insertOne({_id: 1})), code(() => db.wrong.find({$nope: 1}).toArray()),
         code(() => db.wrong.updateOne({}, {$nope: {a: 1}})), code(() => db.runCommand({noSuchThing: 1}))]
    """
    equal(three_ways(script)[0], 11000)
    for url in (FILTER, DATABASE):
        said = shell(url, "try { db.adminCommand({shutdown: 1}) } catch (e) { print(e.code, e.codeName) }")
        equal(said.split(), ["13", "Unauthorized"])


@case
def a_person_at_a_terminal_gets_a_prompt_and_answers():
    for url in (FILTER, DATABASE):
        leader, follower = pty.openpty()
        process = subprocess.Popen([SHELL, url, "--norc"], stdin=follower, stdout=follower, stderr=follower,
                                   env={**os.environ, "TERM": "dumb", "NO_COLOR": "1"}, start_new_session=True)
        os.close(follower)
        seen, deadline = "", time.monotonic() + SECONDS

        def until(pattern):
            nonlocal seen
            while not re.search(pattern, seen):
                assert time.monotonic() < deadline, f"no {pattern} in {seen[-600:]!r}"
                if select.select([leader], [], [], 0.2)[0]:
                    seen += os.read(leader, 65536).decode(errors="replace")

        try:
            until(r"app>")
            assert "Unauthorized" not in seen and "MongoServerError" not in seen, seen[-600:]
            seen = ""
            os.write(leader, b"db.typed.insertOne({_id: 7, said: 'hello'})\r")
            until(r"insertedId: 7")
            seen = ""
            os.write(leader, b"db.typed.find()\r")
            until(r"said: 'hello'")
            seen = ""
            os.write(leader, b"db.typed.drop()\r")
            until(r"true")
            os.write(leader, b".exit\r")
            process.wait(SECONDS)
        finally:
            process.kill()
            process.wait()
            os.close(leader)


main()
