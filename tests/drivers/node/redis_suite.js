// ioredis, node-redis and BullMQ before the proxy.
'use strict';

const fs = require('node:fs');
const assert = require('node:assert/strict');
const Redis = require('ioredis');
const { createClient } = require('redis');
const { Queue, QueueEvents, Worker } = require('bullmq');

const ready = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'));
const only = process.argv.slice(3);
const url = ready.tenants.find((t) => t.org_id === 'umbrella').urls.redis;

const library = `#!lua name=suite
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
`;

async function withIoredis() {
  const r = new Redis(url);
  await r.flushall();
  assert.equal(await r.set("k", "v"), "OK");
  assert.equal(await r.get("k"), "v");
  assert.deepEqual(await r.keys("*"), ["k"]);
  assert.deepEqual(await r.multi().incr("n").incr("n").exec(), [[null, 1], [null, 2]]);
  r.defineCommand("make", { numberOfKeys: 1, lua: "redis.call('SET', KEYS[1] .. ':made', ARGV[1]) return redis.call('GET', KEYS[1] .. ':made')" });
  assert.equal(await r.make("a", "b"), "b");
  assert.equal(await r.make("a", "c"), "c");
  assert.equal(await r.get("a:made"), "c");
  const sub = new Redis(url);
  await sub.subscribe("news");
  const message = new Promise((resolve) => sub.on("message", (channel, text) => resolve([channel, text])));
  assert.equal(await r.publish("news", "hello"), 1);
  assert.deepEqual(await message, ["news", "hello"]);
  const blocked = new Redis(url);
  const popped = blocked.blpop("q", 5);
  await r.rpush("q", "x");
  assert.deepEqual(await popped, ["q", "x"]);
  const values = await Promise.all(Array.from({ length: 500 }, (_, i) => r.set(`p${i}`, i).then(() => r.get(`p${i}`))));
  assert.deepEqual(values, Array.from({ length: 500 }, (_, i) => String(i)));
  await assert.rejects(r.config("SET", "a", "b"), /NOPERM/);
  assert.equal(await r.function("LOAD", "REPLACE", library), "suite");
  assert.equal(await r.fcall("keep", 1, "a", "b"), "b");
  assert.equal(await r.fcall_ro("seen", 1, "a"), "b");
  assert.equal(await r.get("fn:a"), "b");
  assert.deepEqual(await r.multi().fcall("keep", 1, "m", "n").get("fn:m").exec(), [[null, "n"], [null, "n"]]);
  const listed = (await r.function("LIST", "WITHCODE"))[0];
  assert.deepEqual([listed[1], listed[3], listed[7]], ["suite", "LUA", library]);
  assert.equal(await r.function("DELETE", "suite"), "OK");
  await assert.rejects(r.fcall("keep", 1, "a", "b"), /Function not found/);
  for (const client of [r, sub, blocked]) client.disconnect();
}

async function withNodeRedis(RESP) {
  const r = createClient({ url, RESP });
  await r.connect();
  await r.flushAll();
  await r.set("k", "v");
  assert.equal(await r.get("k"), "v");
  await r.hSet("h", { a: "1" });
  assert.equal((await r.hGetAll("h")).a, "1");
  assert.deepEqual(await r.multi().incr("n").get("n").exec(), [1, "1"]);
  await r.xAdd("s", "1-1", { f: "v" });
  assert.equal(await r.functionLoad(library, { REPLACE: true }), "suite");
  assert.equal(await r.fCall("keep", { keys: ["s2"], arguments: ["b"] }), "b");
  assert.equal(await r.fCallRo("seen", { keys: ["s2"] }), "b");
  assert.equal((await r.functionListWithCode())[0].library_code, library);
  assert.equal((await r.functionStats()).engines.LUA.functions_count, 2);
  await r.functionFlush();
  await r.del("fn:s2");
  const sub = r.duplicate();
  await sub.connect();
  const message = new Promise((resolve) => sub.subscribe("c", (text, channel) => resolve([channel, text])).then(() => r.publish("c", "hello")));
  assert.deepEqual(await message, ["c", "hello"]);
  const found = [];
  for await (const keys of r.scanIterator({ MATCH: "*" })) found.push(...[keys].flat());
  assert.deepEqual(found.sort(), ["h", "k", "n", "s"]);
  sub.destroy();
  r.destroy();
}

async function withBullmq() {
  const { hostname: host, port, username, password } = new URL(url);
  const connection = { host, port: Number(port), username, password, maxRetriesPerRequest: null };
  const queue = new Queue("suite", { connection });
  const events = new QueueEvents("suite", { connection });
  await events.waitUntilReady();
  const worker = new Worker("suite", async (job) => job.data.a + job.data.b, { connection });
  const jobs = await queue.addBulk(Array.from({ length: 20 }, (_, i) => ({ name: "add", data: { a: i, b: 1 } })));
  const results = await Promise.all(jobs.map((job) => job.waitUntilFinished(events, 20000)));
  assert.deepEqual(results, Array.from({ length: 20 }, (_, i) => i + 1));
  const delayed = await queue.add("add", { a: 1, b: 2 }, { delay: 100 });
  assert.equal(await delayed.waitUntilFinished(events, 20000), 3);
  await worker.close();
  await events.close();
  await queue.close();
}

const cases = {
  ioredis: withIoredis,
  node_redis_resp2: () => withNodeRedis(2),
  node_redis_resp3: () => withNodeRedis(3),
  bullmq: withBullmq,
};

(async () => {
  let failed = 0;
  for (const [name, step] of Object.entries(cases)) {
    if (only.length > 0 && !only.includes(name)) continue;
    try {
      await step();
      console.log(`PASS ${name}`);
    } catch (error) {
      failed += 1;
      console.log(`FAIL ${name}: ${String(error.stack).replace(/\s+/g, ' ').slice(0, 400)}`);
    }
  }
  process.exit(failed > 0 ? 1 : 0);
})();
