// convex from npm before the proxy: both of its clients, every refusal, and raw frames that no client would send.
'use strict';

const fs = require('node:fs');
const crypto = require('node:crypto');
const assert = require('node:assert/strict');
const { ConvexClient, ConvexHttpClient } = require('convex/browser');
const { makeFunctionReference: ref } = require('convex/server');
const WebSocket = require('ws');
const { organisations, USER } = require('./organisations.js');

const ready = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'));
const only = process.argv.slice(3);
const base = ready.tenants[0].urls.convex;
const demo = (org) => ready.tenants.find((tenant) => tenant.org_id === org).token;
const quiet = { logger: false, skipConvexDeploymentUrlCheck: true };
const open = [];

const list = ref('messages:list');
const send = ref('messages:send');
const big = ref('messages:big');
const channel = () => `c${crypto.randomUUID()}`;

const { token, write, organisation: make } = organisations(process.argv[2], 'cx');
const organisation = (tier) => make((it) => http(it).query(list, { channel: 'x' }).then(() => true, () => false), tier);

function socket(credential, options = {}) {
  const client = new ConvexClient(base, { ...quiet, expectAuth: true, ...options });
  client.setAuth(async () => (typeof credential === 'function' ? credential() : credential));
  open.push(client);
  return client;
}

const http = (credential) => new ConvexHttpClient(base, { ...quiet, auth: credential });

async function until(what, condition, ms = 15000) {
  const end = Date.now() + ms;
  for (;;) {
    const value = await condition();
    if (value) return value;
    assert.ok(Date.now() < end, `waited in vain: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

// A subscription with all that it was told.
function watch(client, query, args) {
  const told = { values: [], errors: [] };
  told.stop = client.onUpdate(query, args, (value) => told.values.push(value), (error) => told.errors.push(error));
  told.last = () => told.values.at(-1);
  return told;
}

const refused = async (promise, limit) => {
  const error = await promise.then(() => assert.fail('it was let in'), (error) => error);
  assert.equal(error.data?.code, 'quota_exceeded', String(error));
  assert.equal(error.data.limit, limit);
  return error;
};

async function admin(deployment, path) {
  const url = ready.convex.deployments[deployment] + path;
  const response = await fetch(url, { method: 'POST', headers: { authorization: `Convex ${ready.convex.admin_key}` } });
  assert.equal(response.status, 200);
}

// Frames by hand. Gives what comes back, and how it ends.
async function raw(frames, { headers, path = '/api/1.48.0/sync', binary = false } = {}) {
  const ws = new WebSocket(base.replace('http', 'ws') + path, { headers });
  const got = { frames: [], closed: null, status: 101, ws };
  ws.on('message', (data) => got.frames.push(JSON.parse(data.toString())));
  ws.on('close', (code, reason) => (got.closed = { code, reason: reason.toString() }));
  ws.on('unexpected-response', (_, response) => ((got.status = response.statusCode), (got.closed = {}), ws.terminate()));
  ws.on('error', () => {});
  open.push({ close: () => ws.terminate() });
  await until('it opens', () => ws.readyState === 1 || got.closed);
  for (const frame of frames) ws.send(typeof frame === 'string' || Buffer.isBuffer(frame) ? frame : JSON.stringify(frame), { binary });
  return got;
}
const connect = (sessionId = crypto.randomUUID(), more = {}) => ({ type: 'Connect', sessionId, connectionCount: 0, lastCloseReason: null, clientTs: 0, ...more });
const authenticate = (value, baseVersion = 0) => ({ type: 'Authenticate', baseVersion, tokenType: 'User', value });

const cases = {
  async calls_over_http() {
    const client = http(demo('acme'));
    const c = channel();
    assert.ok(await client.mutation(send, { channel: c, body: 'one' }));
    await client.action(ref('messages:sendFromAction'), { channel: c, body: 'two' });
    assert.deepEqual((await client.query(list, { channel: c })).map((it) => it.body), ['one', 'two']);
    const me = await client.query(ref('messages:whoami'), {});
    assert.equal(me.org_id, 'acme');
    assert.match(me.issuer, /^http:\/\/127\.0\.0\.1:/);
    assert.equal(me['app_metadata.provider'], 'email');
    await assert.rejects(client.mutation(ref('messages:refuse'), {}), (error) => error.data.code === 'app_says_no');
    await assert.rejects(client.mutation(ref('messages:purge'), {}), /Could not find public function/);
    assert.deepEqual((await client.consistentQuery(list, { channel: c }).catch((error) => error.message)).slice(0, 1).length, 1);
  },

  async live_updates() {
    const [reader, writer] = [socket(demo('globex')), socket(demo('globex'))];
    const c = channel();
    const seen = watch(reader, list, { channel: c });
    await until('the first result', () => seen.last());
    await writer.mutation(send, { channel: c, body: 'hello' });
    await until('the message', () => seen.last().length === 1);
    await writer.action(ref('messages:sendFromAction'), { channel: c, body: 'again' });
    await until('the second', () => seen.last().length === 2);
    await assert.rejects(writer.mutation(ref('messages:refuse'), {}), (error) => error.data.code === 'app_says_no');
    assert.equal(await writer.action(ref('messages:slow'), { ms: 10 }), 10);
    assert.equal((await writer.query(ref('messages:whoami'), {})).org_id, 'globex');
    assert.deepEqual(seen.errors, []);
  },

  async organisations_never_see_each_other() {
    const c = channel();
    // acme and globex have deployments of their own; initech and umbrella share one.
    for (const [one, other] of [['acme', 'globex'], ['initech', 'umbrella'], ['acme', 'initech']]) {
      const [a, b] = [socket(demo(one)), socket(demo(other))];
      const [seenA, seenB] = [watch(a, list, { channel: c }), watch(b, list, { channel: c })];
      await until('both', () => seenA.last() && seenB.last());
      const [beforeA, beforeB] = [seenA.last().length, seenB.last().length];
      // Where the deployment is shared, the argument is ours; on one's own it is the application's.
      await a.mutation(send, { channel: c, body: `${one} says`, ...(one === 'initech' ? { orgId: other } : {}) });
      await until('its own', () => seenA.last().length === beforeA + 1);
      // A write of B's own comes after whatever A's could have caused.
      await b.mutation(send, { channel: c, body: `${other} says` });
      await until('its own', () => seenB.last().length > beforeB);
      assert.equal(seenB.last().length, beforeB + 1, JSON.stringify(seenB.last()));
      assert.ok(!JSON.stringify(seenB.last()).includes(`${one} says`));
      const told = await http(demo(other)).query(list, { channel: c, orgId: one });
      assert.ok(!JSON.stringify(told).includes(`${one} says`));
      await Promise.all([a.close(), b.close()]);
    }
  },

  async the_organisations_argument_is_ours() {
    const client = http(demo('umbrella'));
    assert.equal((await client.query(ref('messages:whoami'), { orgId: 'initech' })).argument, 'umbrella');
    const args = encodeURIComponent(JSON.stringify({ orgId: 'initech' }));
    const headers = { authorization: `Bearer ${demo('umbrella')}` };
    const by_url = await (await fetch(`${base}/api/query?path=messages:whoami&args=${args}&format=json`, { headers })).json();
    assert.equal(by_url.value.argument, 'umbrella', JSON.stringify(by_url));
    const post = async (path, body) => (await fetch(base + path, { method: 'POST', headers: { ...headers, 'content-type': 'application/json' }, body })).json();
    const ran = await post('/api/run/messages/whoami', JSON.stringify({ args: { orgId: 'initech' } }));
    assert.equal(ran.value.argument, 'umbrella');
    const many = await post('/api/query_batch', JSON.stringify({ queries: [{ path: 'messages:whoami', args: { orgId: 'initech' } }, { path: 'messages:whoami', args: [{}] }] }));
    assert.deepEqual(many.results.map((it) => it.value.argument), ['umbrella', 'umbrella']);
    for (const body of ['{"path":"messages:whoami","args":{"orgId":"a","orgId":"initech"}}', '{"path":"messages:whoami","args":{"org\\u0049d":"initech"}}', '{"path":"messages:whoami","args":{},"args":{"orgId":"initech"}}']) {
      assert.equal((await post('/api/query', body)).code, 'BadRequest', body);
    }
  },

  async subscriptions_are_refused_one_by_one() {
    const org = await organisation();
    const client = socket(token(org));
    const c = channel();
    const all = Array.from({ length: 50 }, (_, n) => watch(client, big, { channel: c, bytes: n }));
    await until('fifty', () => all.every((it) => it.last()));
    const more = [watch(client, big, { channel: c, bytes: 1000 }), watch(client, big, { channel: c, bytes: 1001 })];
    await until('the refusals', () => more.every((it) => it.errors.length > 0));
    assert.deepEqual(more.map((it) => [it.errors[0].data.limit, it.errors[0].data.max, it.errors[0].data.tier]), Array(2).fill(['subscriptions', 50, 'FREE']));
    assert.match(more[0].errors[0].message, /subscribed queries/);
    await client.mutation(send, { channel: c, body: 'x' });
    await until('all others are live', () => all.every((it) => it.last().count === 1));
    assert.ok(more.every((it) => it.values.length === 0));
    // Ending a refused one, and using a place that was given back.
    more[0].stop();
    all[0].stop();
    const next = watch(client, big, { channel: c, bytes: 2000 });
    await until('the free place', () => next.last());
    assert.deepEqual(next.errors, []);
    await client.mutation(send, { channel: c, body: 'y' });
    await until('still live', () => next.last().count === 2 && all[49].last().count === 2);
  },

  async subscriptions_of_all_sockets_are_counted_together() {
    const org = await organisation();
    // As clients that come back, whose subscriptions are not refused for the rate.
    const come = (count) => raw([connect(crypto.randomUUID(), { connectionCount: 1 }), authenticate(token(org)), { type: 'ModifyQuerySet', baseVersion: 0, newVersion: 1, modifications: Array.from({ length: count }, (_, n) => ({ type: 'Add', queryId: n, udfPath: 'messages:list', args: [{ channel: `${n}` }] })) }]);
    const told = (socket) => socket.frames.flatMap((frame) => frame.modifications ?? []);
    const full = [await come(50), await come(50)];
    await until('a hundred', () => full.every((it) => told(it).filter((one) => one.type === 'QueryUpdated').length === 50));
    const late = await come(1);
    await until('the refusal', () => told(late).length > 0);
    const { type, errorData } = told(late)[0];
    assert.deepEqual([type, errorData.code, errorData.limit, errorData.max], ['QueryFailed', 'quota_exceeded', 'subscriptions', 100]);
    full[0].ws.terminate();
    await until('what was given back', async () => {
      const next = await come(1);
      await until('an answer', () => told(next).length > 0);
      const good = told(next)[0].type === 'QueryUpdated';
      next.ws.terminate();
      return good;
    });
  },

  async a_new_tier_is_felt_on_the_living_socket() {
    const org = await organisation();
    const client = socket(token(org));
    const c = channel();
    const all = Array.from({ length: 50 }, (_, n) => watch(client, big, { channel: c, bytes: n }));
    await until('fifty', () => all.every((it) => it.last()));
    const before = client.connectionState?.().connectionCount;
    await write({ _id: org, tier: 'PRO', status: 'active', epoch: 2 });
    let more = null;
    await until('room', async () => {
      more?.stop();
      more = watch(client, big, { channel: c, bytes: 10_000 + Math.floor(Math.random() * 1e6) % 1000 });
      await until('an answer', () => more.last() || more.errors.length > 0);
      return more.last();
    });
    await write({ _id: org, tier: 'FREE', status: 'active', epoch: 3 });
    await until('no room', async () => {
      const probe = watch(client, big, { channel: c, bytes: 20_000 + Math.floor(Math.random() * 1e6) % 1000 });
      await until('an answer', () => probe.last() || probe.errors.length > 0);
      const full = probe.errors.length > 0;
      probe.stop();
      return full;
    });
    // What was there stays, on the same socket.
    await until('a write', () => client.mutation(send, { channel: c, body: 'x' }).then(() => true, () => false));
    await until('live', () => more.last().count > 0 && all[7].last().count > 0);
    assert.equal(client.connectionState?.().connectionCount, before);
  },

  async calls_over_the_rate_are_refused_one_by_one() {
    const org = await organisation();
    const client = socket(token(org));
    const c = channel();
    const seen = watch(client, list, { channel: c });
    await until('the first result', () => seen.last());
    const results = [];
    // Eight at a time, as many as may be under way.
    for (let n = 0; n < 15; n += 1) results.push(...(await Promise.allSettled(Array.from({ length: 8 }, (_, i) => client.mutation(send, { channel: c, body: `${n}.${i}` })))));
    const bad = results.filter((it) => it.status === 'rejected');
    assert.ok(bad.length >= 5 && bad.length < 60, `${bad.length} of 120 were refused`);
    for (const { reason } of bad) assert.deepEqual([reason.data?.code, reason.data?.limit, reason.data?.max], ['quota_exceeded', 'rate', 300], String(reason));
    await until('the others', () => seen.last().length === 120 - bad.length);
    const wait = bad.at(-1).reason.data.retryAfterMs;
    assert.ok(wait > 0 && wait <= 1000, `${wait}`);
    await until('it goes on', () => client.mutation(send, { channel: c, body: 'later' }).then(() => true, () => false));
    const actions = await Promise.allSettled(Array.from({ length: 8 }, () => client.action(ref('messages:slow'), { ms: 1 })));
    assert.ok(actions.some((it) => it.status === 'rejected' && it.reason.data.limit === 'rate'));
    // And over HTTP, in Convex' own way.
    const answers = await Promise.all(Array.from({ length: 10 }, () => fetch(`${base}/api/query?path=messages:list&args={"channel":"x"}`, { headers: { authorization: `Bearer ${token(org)}`, origin: 'http://page' } })));
    const over = answers.find((it) => it.status === 429);
    assert.ok(over, 'none was refused');
    assert.ok(Number(over.headers.get('retry-after')) >= 1);
    assert.equal(over.headers.get('access-control-allow-origin'), 'http://page');
    assert.equal((await over.json()).code, 'QuotaExceeded');
    await assert.rejects(async () => { for (let n = 0; n < 20; n += 1) await http(token(org)).query(list, { channel: c }); }, /QuotaExceeded/);
  },

  async a_batch_is_as_many_calls_as_it_has() {
    const org = await organisation();
    const ask = async (count) => fetch(`${base}/api/query_batch`, {
      method: 'POST',
      headers: { authorization: `Bearer ${token(org)}`, 'content-type': 'application/json' },
      body: JSON.stringify({ queries: Array.from({ length: count }, () => ({ path: 'messages:list', args: { channel: 'x' } })) }),
    });
    assert.equal((await ask(90)).status, 200);
    assert.equal((await ask(60)).status, 429);
    assert.equal((await ask(5)).status, 200);
    assert.equal((await ask(1001)).status, 400);
  },

  async writes_under_way_are_counted() {
    const org = await organisation();
    const [one, other] = [socket(token(org)), socket(token(org))];
    const slow = ref('messages:slow');
    const running = Array.from({ length: 8 }, (_, n) => (n % 2 ? one : other).action(slow, { ms: 1500 }));
    await new Promise((resolve) => setTimeout(resolve, 500));
    const error = await refused(one.action(slow, { ms: 1 }), 'in_flight');
    assert.deepEqual([error.data.max, error.data.inUse], [8, 8]);
    await refused(other.mutation(send, { channel: 'x', body: 'y' }), 'in_flight');
    assert.equal((await fetch(`${base}/api/mutation`, { method: 'POST', headers: { authorization: `Bearer ${token(org)}` }, body: '{"path":"messages:send","args":{"channel":"x","body":"y"}}' })).status, 429);
    assert.deepEqual(await Promise.all(running), Array(8).fill(1500));
    assert.equal(await one.action(slow, { ms: 1 }), 1);
  },

  async sockets_over_the_cap_are_answered_and_come_in_later() {
    const org = await organisation();
    const full = [];
    for (let n = 0; n < 25; n += 1) full.push(await raw([connect(), authenticate(token(org))]));
    await until('all are in', () => full.every((it) => it.frames.some((frame) => frame.type === 'Transition')));
    const late = socket(token(org));
    const seen = watch(late, list, { channel: 'x' });
    await until('the refusal', () => seen.errors.length > 0);
    assert.deepEqual([seen.errors[0].data.limit, seen.errors[0].data.max], ['client_sockets', 25]);
    await refused(late.mutation(send, { channel: 'x', body: 'y' }), 'client_sockets');
    full.slice(0, 2).forEach((it) => it.ws.terminate());
    await until('it comes in by itself', () => seen.last(), 40000);
    full.forEach((it) => it.ws.terminate());
  },

  async large_payloads_are_refused_one_by_one() {
    const org = await organisation();
    const client = socket(token(org));
    const error = await client.mutation(send, { channel: 'x', body: 'y'.repeat(1 << 20) }).catch((error) => error);
    assert.equal(error.data?.code, 'payload_too_large', String(error));
    const seen = watch(client, list, { channel: 'x'.repeat(1 << 20) });
    await until('the refusal', () => seen.errors.length > 0);
    assert.ok(await client.mutation(send, { channel: 'x', body: 'small' }));
    const response = await fetch(`${base}/api/mutation`, { method: 'POST', headers: { authorization: `Bearer ${token(org)}` }, body: JSON.stringify({ path: 'messages:send', args: { channel: 'x', body: 'y'.repeat(2 << 20) } }) });
    assert.equal(response.status, 413);
  },

  async chunked_transitions() {
    const client = socket(demo('initech'));
    const c = channel();
    const seen = watch(client, big, { channel: c, bytes: 500_000 });
    await until('half a megabyte', () => seen.last()?.filling.length === 500_000, 30000);
    await Promise.all(Array.from({ length: 20 }, (_, n) => client.mutation(send, { channel: c, body: `${n}` })));
    await until('all twenty', () => seen.last().count === 20, 30000);
  },

  async refusals_while_chunks_come() {
    const org = await organisation();
    const client = socket(token(org));
    const c = channel();
    const seen = watch(client, big, { channel: c, bytes: 300_000 });
    await until('the first', () => seen.last(), 30000);
    const results = [];
    for (let n = 0; n < 8; n += 1) results.push(...(await Promise.allSettled(Array.from({ length: 16 }, (_, i) => client.mutation(send, { channel: c, body: `${n}.${i}` })))));
    const good = results.filter((it) => it.status === 'fulfilled').length;
    assert.ok(good >= 60 && good < 128, `${good} of 128`);
    assert.ok(results.every((it) => it.status === 'fulfilled' || it.reason.data?.code === 'quota_exceeded'));
    await until('every one that was let in', () => seen.last().count === good, 30000);
  },

  async a_suspended_organisation_is_told_and_comes_back() {
    const org = await organisation();
    const client = socket(token(org));
    const seen = watch(client, list, { channel: 'x' });
    await until('the first', () => seen.last());
    await write({ _id: org, tier: 'FREE', status: 'suspended', epoch: 2 });
    await until('the refusal', () => seen.errors.length > 0);
    assert.equal(seen.errors[0].data.code, 'suspended');
    await assert.rejects(client.mutation(send, { channel: 'x', body: 'y' }), (error) => error.data.code === 'suspended');
    assert.equal((await fetch(`${base}/api/query?path=messages:list`, { headers: { authorization: `Bearer ${token(org)}` } })).status, 403);
    await write({ _id: org, tier: 'FREE', status: 'active', epoch: 3 });
    const before = seen.values.length;
    await until('it lives again', () => seen.values.length > before, 40000);
  },

  async a_token_is_renewed_and_its_end_is_told() {
    const org = await organisation();
    let fetched = 0;
    const users = Array.from({ length: 5 }, () => crypto.randomUUID());
    const states = [];
    const client = new ConvexClient(base, { ...quiet, expectAuth: true });
    open.push(client);
    client.setAuth(async () => ((fetched += 1), token(org, { seconds: 3600, subject: users[fetched - 1] })), (state) => states.push(state));
    const seen = watch(client, ref('messages:whoami'), {});
    await until('the fresh token', () => fetched >= 2 && seen.last()?.subject === users[1]);
    assert.ok(states.length > 0 && states.every(Boolean), `${states}`);
    // Expired beyond the leeway: nobody's.
    const got = await raw([connect(), authenticate(token(org, { seconds: -60 }))]);
    await until('the answer', () => got.closed);
    assert.deepEqual([got.frames[0].type, got.frames[0].authUpdateAttempted, got.frames[0].baseVersion], ['AuthError', true, 0]);
    // It ends in the middle: two seconds from now, leeway of 30 s included.
    const short = await raw([connect(), authenticate(token(org, { seconds: -28 })), { type: 'ModifyQuerySet', baseVersion: 0, newVersion: 1, modifications: [] }]);
    await until('its end', () => short.closed, 20000);
    const last = short.frames.at(-1);
    assert.deepEqual([last.type, last.authUpdateAttempted], ['AuthError', false], JSON.stringify(last));
    assert.ok(short.frames.some((frame) => frame.type === 'Transition'));
  },

  async another_organisations_token_moves_the_client() {
    let org = 'acme';
    const client = socket(() => demo(org));
    const seen = watch(client, ref('messages:whoami'), {});
    await until('acme', () => seen.last()?.org_id === 'acme');
    org = 'globex';
    client.setAuth(async () => demo(org));
    await until('globex', () => seen.last()?.org_id === 'globex');
    org = 'umbrella';
    client.setAuth(async () => demo(org));
    await until('umbrella', () => seen.last()?.argument === 'umbrella');
  },

  async a_lost_reply_is_one_message() {
    const org = 'acme';
    const client = socket(demo(org));
    const c = channel();
    const seen = watch(client, list, { channel: c });
    await until('the first', () => seen.last());
    await admin('acme', '/double/lose-reply');
    await client.mutation(send, { channel: c, body: 'once' });
    await until('it is there', () => seen.last().length >= 1);
    assert.equal((await http(demo(org)).query(list, { channel: c })).length, 1);
    await admin('acme', '/double/drop');
    await client.mutation(send, { channel: c, body: 'twice' });
    await until('live again', () => seen.last().length === 2);
  },

  async a_ghost_does_not_refuse_its_own_client() {
    const org = await organisation();
    const session = crypto.randomUUID();
    const adds = (from, count) => Array.from({ length: count }, (_, n) => ({ type: 'Add', queryId: from + n, udfPath: 'messages:list', args: [{ channel: `${n}` }] }));
    const first = await raw([connect(session), authenticate(token(org)), { type: 'ModifyQuerySet', baseVersion: 0, newVersion: 1, modifications: adds(0, 50) }]);
    await until('fifty', () => first.frames.some((frame) => frame.modifications?.length === 50));
    const second = await raw([connect(session, { connectionCount: 1 }), authenticate(token(org)), { type: 'ModifyQuerySet', baseVersion: 0, newVersion: 1, modifications: adds(0, 50) }]);
    await until('fifty again', () => second.frames.some((frame) => frame.modifications?.length === 50));
    await until('the ghost is gone', () => first.closed);
    assert.ok(!second.frames.some((frame) => frame.modifications?.some((it) => it.type === 'QueryFailed')));
  },

  async administrators_ways_are_closed() {
    const key = ready.convex.admin_key;
    const body = JSON.stringify({ path: 'messages:purge', args: {} });
    const post = (path, headers = {}) => fetch(base + path, { method: 'POST', headers: { 'content-type': 'application/json', ...headers }, body });
    // They would open the deployment itself.
    assert.equal((await fetch(ready.convex.deployments.acme + '/api/list_snapshot', { headers: { authorization: `Convex ${key}` } })).status, 200);
    const bearer = { authorization: `Bearer ${demo('acme')}` };
    for (const [path, headers] of [
      ['/api/mutation', { authorization: `Convex ${key}` }],
      ['/api/mutation', { authorization: `convex ${key}` }],
      [`/api/mutation?adminKey=${key}`, {}],
      [`/api/mutation?%61dminKey=${key}`, bearer],
      ['/api/function', bearer],
      [`/http/hello?adminKey=${key}`, { ...bearer, host: 'acme.localhost' }],
      ['/api/list_snapshot', bearer],
      ['/api/v1/pause_deployment', bearer],
    ]) {
      assert.equal((await post(path, headers)).status, 403, path);
    }
    assert.equal((await post('/api/mutation')).status, 401);
    const internal = await (await post('/api/mutation', bearer)).json();
    assert.equal(internal.status, 'error');
    const admin = await raw([connect(), { type: 'Authenticate', baseVersion: 0, tokenType: 'Admin', value: key, impersonating: { subject: 'x', issuer: 'y' } }]);
    await until('the refusal', () => admin.closed);
    assert.equal(admin.frames[0].type, 'AuthError');
    const later = await raw([connect(), authenticate(demo('acme')), { type: 'Authenticate', baseVersion: 1, tokenType: 'Admin', value: key }]);
    await until('the refusal', () => later.closed);
    assert.ok(later.frames.some((frame) => frame.type === 'AuthError'));
    const component = await raw([connect(), authenticate(demo('acme')), { type: 'Mutation', requestId: 0, udfPath: 'messages:purge', args: [{}], componentPath: 'c' }, { type: 'ModifyQuerySet', baseVersion: 0, newVersion: 1, modifications: [{ type: 'Add', queryId: 0, udfPath: 'messages:list', args: [{}], componentPath: 'c' }] }]);
    await until('both refusals', () => component.frames.some((it) => it.type === 'MutationResponse') && component.frames.some((it) => it.modifications?.some((one) => one.type === 'QueryFailed')));
    assert.equal(component.frames.find((it) => it.type === 'MutationResponse').errorData.code, 'forbidden');
    assert.equal(component.closed, null);
  },

  async frames_that_no_client_sends() {
    const mine = demo('umbrella');
    for (const frame of [
      '{"type":"Mutation","requestId":1,"requestId":2,"udfPath":"messages:list","args":[{}]}',
      '{"type":"ModifyQuerySet","baseVersion":0,"newVersion":1,"modifications":[{"type":"Add","queryId":0,"udfPath":"messages:list","args":[{}],"component\\u0050ath":"c"}]}',
      `{"type":"Event","eventType":"x","event":${'['.repeat(500)}${']'.repeat(500)}}`,
      'null', '[]', 'hello', '{"type":"Nothing"}',
    ]) {
      const got = await raw([connect(), authenticate(mine), frame]);
      await until(`an end to ${frame.slice(0, 60)}`, () => got.closed);
      assert.equal(got.closed.code, 1002, frame);
      assert.ok(!got.frames.some((it) => it.type === 'FatalError'));
    }
    const binary = await raw([Buffer.from(JSON.stringify(connect()))], { binary: true });
    await until('an end', () => binary.closed);
    const huge = await raw(['x'.repeat(3 << 20)]);
    await until('an end to what is too much from a stranger', () => huge.closed);
    const unlike = await raw([{ ...authenticate(mine) }]);
    await until('an end: Connect comes first', () => unlike.closed);
    // Versions are the deployment's to judge.
    const gap = await raw([connect(), authenticate(mine), { type: 'ModifyQuerySet', baseVersion: 5, newVersion: 6, modifications: [] }]);
    await until('an end', () => gap.closed);
  },

  async without_a_token_everything_fails_and_the_socket_stays() {
    const client = new ConvexClient(base, quiet);
    open.push(client);
    const seen = watch(client, list, { channel: 'x' });
    await until('the refusal', () => seen.errors.length > 0, 25000);
    assert.equal(seen.errors[0].data.code, 'unauthenticated');
    await assert.rejects(client.mutation(send, { channel: 'x', body: 'y' }), (error) => error.data.code === 'unauthenticated');
    client.setAuth(async () => demo('globex'));
    await until('it comes in', () => seen.last(), 25000);
  },

  async files_and_http_actions_at_the_tenants_own_host() {
    // Node's fetch takes no Host of ours; a raw request does.
    const ask = (method, path, headers = {}, body) => new Promise((resolve, reject) => {
      const url = new URL(base);
      const request = require('node:http').request({ host: url.hostname, port: url.port, method, path, headers, agent: false }, (response) => {
        const parts = [];
        response.on('data', (part) => parts.push(part)).on('end', () => resolve({ status: response.statusCode, headers: response.headers, text: Buffer.concat(parts).toString() }));
      });
      request.on('error', reject).end(body);
    });
    const host = `acme.localhost:${new URL(base).port}`;
    const client = http(demo('acme'));
    const address = new URL(await client.mutation(ref('messages:uploadUrl'), {}));
    assert.equal(address.host, host);
    const stored = await ask('POST', address.pathname + address.search, { host, 'content-type': 'text/plain' }, 'a file');
    assert.equal(stored.status, 200, stored.text);
    const file = new URL(await client.query(ref('messages:fileUrl'), { id: JSON.parse(stored.text).storageId }));
    assert.equal(file.host, host);
    const read = await ask('GET', file.pathname, { host });
    assert.deepEqual([read.status, read.text, read.headers['content-type']], [200, 'a file', 'text/plain']);
    const other = await ask('GET', file.pathname, { host: `globex.localhost:${new URL(base).port}` });
    assert.equal(other.status, 404);
    assert.equal((await ask('GET', file.pathname, { host: new URL(base).host })).status, 401);
    assert.equal((await ask('GET', file.pathname, { host: 'nobody.localhost' })).status, 401);
    const large = await ask('POST', address.pathname + address.search, { host, 'content-length': 11 << 20 }).catch((error) => ({ status: error.code }));
    assert.equal(large.status, 413);
    const hello = await ask('GET', '/http/hello', { host, 'x-forwarded-for': '6.6.6.6' });
    assert.deepEqual(JSON.parse(hello.text), { hello: 'anonymous', address: '127.0.0.1' });
    const known = await ask('GET', '/http/hello', { host, authorization: `Bearer ${token('acme')}` });
    assert.equal(JSON.parse(known.text).hello, USER);
    assert.equal((await ask('GET', '/http/hello', { host, authorization: `Bearer ${demo('globex')}` })).status, 401);
    assert.equal((await ask('POST', '/api/query', { host, authorization: `Bearer ${demo('globex')}` }, '{}')).status, 401);
    const preflight = await ask('OPTIONS', '/api/mutation', { host, origin: 'http://page', 'access-control-request-headers': 'authorization' });
    assert.deepEqual([preflight.status, preflight.headers['access-control-allow-origin'], preflight.headers['access-control-allow-headers']], [204, 'http://page', 'authorization']);
    const keys = await ask('GET', '/.well-known/jwks.json');
    assert.equal(JSON.parse(keys.text).keys[0].alg, 'ES256');
    assert.equal((await ask('POST', '/echo', {}, 'x')).status, 403);
  },

  async a_token_of_ours_is_worth_nothing_elsewhere() {
    // What acme's deployment got is no token here, nor at globex'.
    const org = await organisation();
    const stolen = await new Promise((resolve) => {
      const server = require('node:http').createServer((request, response) => (resolve(request.headers.authorization), response.end('{"status":"success","value":null}'))).listen(0, '127.0.0.1', async () => {
        await write({ _id: org, tier: 'FREE', status: 'active', epoch: 2, routes: { convex: { url: `http://127.0.0.1:${server.address().port}` } } });
        until('the deployment is asked', () => http(token(org)).query(list, { channel: 'x' }).then((it) => it === null, () => false)).then(() => server.close());
      });
    });
    assert.match(stolen, /^Bearer ey/);
    for (const url of [base, ready.convex.deployments.acme, ready.convex.deployments.shared]) {
      const response = await fetch(`${url}/api/query?path=messages:list&args={"channel":"x"}`, { headers: { authorization: stolen } });
      assert.equal(response.status, 401, url);
    }
  },
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
      console.log(`FAIL ${name}: ${String(error.stack).replace(/\s+/g, ' ').slice(0, 500)}`);
    }
    for (const client of open.splice(0)) await Promise.resolve(client.close()).catch(() => {});
  }
  process.exit(failed > 0 ? 1 : 0);
})();
