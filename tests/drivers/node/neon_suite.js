// Neon: @neondatabase/serverless over HTTP and WebSocket, drizzle, kysely, plain fetch; and the case file, whose values
// come from PostgreSQL itself through node-postgres.
'use strict';

const fs = require('node:fs');
const path = require('node:path');
const http = require('node:http');
const assert = require('node:assert/strict');
const ws = require('ws');
const pg = require('pg');
const { neon, neonConfig, Client, Pool, NeonDbError } = require('@neondatabase/serverless');

const ready = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'));
const only = process.argv.slice(3);
const CASE_MS = 60_000;
const host = `127.0.0.1:${ready.ports.http}`;

neonConfig.fetchEndpoint = () => `http://${host}/sql`;
neonConfig.wsProxy = () => `${host}/v2`;
neonConfig.useSecureWebSocket = false;
neonConfig.webSocketConstructor = ws;

const tenant = (org) => ready.tenants.find((t) => t.org_id === org);
const url = (org) => tenant(org).urls.neon;
const bare = 'postgres://app@127.0.0.1/app';

// A POST /sql without the driver, on a connection of its own.
async function post(org, body, headers = {}, options = {}) {
  const response = await fetch(`http://${host}/sql`, {
    method: 'POST',
    headers: { 'Neon-Connection-String': url(org), ...headers },
    body: typeof body === 'string' ? body : JSON.stringify(body),
    ...options,
  });
  const text = await response.text();
  let json;
  try {
    json = JSON.parse(text);
  } catch {
    json = undefined;
  }
  return { status: response.status, headers: response.headers, text, json };
}

async function refused(promise, code, more = () => {}) {
  await assert.rejects(promise, (error) => {
    assert.equal(error.code, code, `${error.code}: ${error.message}`);
    more(error);
    return true;
  });
}

async function withClient(org, run, options = {}) {
  const client = new Client({ connectionString: url(org), ...options });
  client.on('error', () => {});
  await client.connect();
  try {
    return await run(client);
  } finally {
    await client.end().catch(() => {});
  }
}

const unique = () => `t_${process.pid}_${Math.random().toString(36).slice(2, 8)}`;

// The rows of a statement as PostgreSQL's own text, past dynabase's HTTP: node-postgres on the Postgres wire of the
// administrator, with parsers that leave the text alone.
async function plainRows(query, params) {
  const client = new pg.Client({ connectionString: ready.upstreams.postgres, ssl: false });
  await client.connect();
  try {
    const types = { getTypeParser: () => (text) => text };
    return await client.query({ text: query, values: params, rowMode: 'array', types });
  } finally {
    await client.end();
  }
}

// One pair of the case file: the answer is what it says, and its values are PostgreSQL's.
async function checkCase({ request, headers = {}, status = 200, expect = {}, rows, plain = true }) {
  const answer = await post('umbrella', request, headers);
  assert.equal(answer.status, status, answer.text);
  for (const [key, value] of Object.entries(expect)) assert.deepStrictEqual(answer.json[key], value, key);
  if (rows !== undefined) assert.deepStrictEqual(answer.json.rows, rows);
  if (status !== 200 || !plain || request.query === undefined) return;
  // What PostgreSQL says, as text, through another wire and another driver.
  const raw = await post('umbrella', request, { ...headers, 'Neon-Raw-Text-Output': 'true', 'Neon-Array-Mode': 'true' });
  const theirs = await plainRows(request.query, request.params ?? []);
  const text = raw.json.rows.map((row) => (Array.isArray(row) ? row : Object.values(row)));
  assert.deepStrictEqual(text, theirs.rows);
  const field = (f) => [f.name, f.dataTypeID, f.dataTypeModifier, f.dataTypeSize];
  assert.deepStrictEqual(raw.json.fields.map(field), theirs.fields.map(field));
  assert.equal(raw.json.rowCount, theirs.rowCount);
  assert.equal(raw.json.command, theirs.command ?? '');
}

const cases = {
  http_single_and_parameters: async () => {
    const sql = neon(url('acme'));
    assert.deepEqual(await sql`SELECT 1 AS one`, [{ one: 1 }]);
    const rows = await sql`SELECT ${7}::int AS i, ${"quo'te"}::text AS t, ${{ a: [1] }}::jsonb AS j, ${['x', null, 'y"z']}::text[] AS a, ${null}::text AS n`;
    assert.deepEqual(rows, [{ i: 7, t: "quo'te", j: { a: [1] }, a: ['x', null, 'y"z'], n: null }]);
    assert.deepEqual(await sql.query('SELECT $1::bytea AS b', [Buffer.from([0, 255])]), [{ b: Buffer.from([0, 255]) }]);
    assert.deepEqual(await sql`SELECT 2 AS a, 3 AS a`, [{ a: 3 }]);
  },

  http_full_results: async () => {
    const sql = neon(url('acme'), { fullResults: true, arrayMode: true });
    const full = await sql`SELECT 1::int AS a, 'x'::text AS b WHERE true`;
    assert.deepEqual(full.rows, [[1, 'x']]);
    assert.equal(full.command, 'SELECT');
    assert.equal(full.rowCount, 1);
    assert.deepEqual(
      full.fields.map(({ name, dataTypeID, format }) => ({ name, dataTypeID, format })),
      [{ name: 'a', dataTypeID: 23, format: 'text' }, { name: 'b', dataTypeID: 25, format: 'text' }],
    );
    assert.deepEqual(Object.keys(full).filter((k) => !['fields', 'rows', 'command', 'rowCount', 'rowAsArray', 'viaNeonFetch', '_parsers', '_types', 'RowCtor'].includes(k)), []);
  },

  http_results_equal_node_postgres: async () => {
    const sql = neon(url('acme'), { fullResults: true });
    const statement = `SELECT 1::int2 a, 2::int8 b, 1.5::numeric c, 'NaN'::float8 d, true e, '2024-01-02'::date f,
      '2024-01-02 03:04:05+00'::timestamptz g, '{1,2}'::int[] h, '{"a":1}'::jsonb i, NULL k`;
    const ours = await sql.query(statement);
    const { host: h, port, username, password } = new URL(tenant('acme').urls.postgres.replace('postgres:', 'http:')) ;
    const client = new pg.Client({ host: h.split(':')[0], port: Number(port), user: username, password: decodeURIComponent(password), database: 'app', ssl: false });
    await client.connect();
    const theirs = await client.query(statement);
    await client.end();
    assert.deepEqual(ours.rows, theirs.rows);
    const fields = (list) => list.map((f) => ({ ...f }));
    assert.deepEqual(fields(ours.fields), fields(theirs.fields));
    assert.equal(ours.rowCount, theirs.rowCount);
    assert.equal(ours.command, theirs.command);
  },

  http_errors_have_all_fields: async () => {
    const sql = neon(url('acme'));
    await refused(sql`SELECT * FROM nowhere`, '42P01', (error) => {
      assert.ok(error instanceof NeonDbError);
      assert.equal(error.severity, 'ERROR');
      assert.equal(error.position, '15');
      assert.ok(error.routine && error.file && error.line);
    });
    await refused(sql`SELECT 1/0`, '22012');
    await refused(sql.query('SELECT 1; SELECT 2'), '42601');
    await refused(sql.query('SELECT $1::int', []), '08P01');
    const table = unique();
    await sql.query(`CREATE TABLE ${table} (id int PRIMARY KEY, n int NOT NULL CHECK (n > 0))`);
    await sql.query(`INSERT INTO ${table} VALUES (1, 1)`);
    await refused(sql.query(`INSERT INTO ${table} VALUES (1, 1)`), '23505', (error) => {
      assert.equal(error.table, table);
      assert.equal(error.constraint, `${table}_pkey`);
      assert.equal(error.schema, 'public');
      assert.ok(error.detail);
    });
    await refused(sql.query(`INSERT INTO ${table} VALUES (2, NULL)`), '23502', (error) => assert.equal(error.column, 'n'));
    await sql.query(`DROP TABLE ${table}`);
  },

  http_transactions: async () => {
    const sql = neon(url('acme'));
    const table = unique();
    await sql.query(`CREATE TABLE ${table} (id int PRIMARY KEY)`);
    const results = await sql.transaction([sql.query(`INSERT INTO ${table} VALUES (1)`), sql.query(`SELECT * FROM ${table}`)]);
    assert.deepEqual(results, [[], [{ id: 1 }]]);
    await refused(sql.transaction([sql.query(`INSERT INTO ${table} VALUES (2)`), sql.query(`INSERT INTO ${table} VALUES (1)`)]), '23505');
    assert.deepEqual(await sql.query(`SELECT count(*)::int AS n FROM ${table}`), [{ n: 1 }]);
    await refused(
      sql.transaction([sql.query(`INSERT INTO ${table} VALUES (3)`)], { readOnly: true, isolationLevel: 'Serializable', deferrable: true }),
      '25006');
    const [[level], [mode], [deferrable]] = await sql.transaction(
      [sql`SHOW transaction_isolation`, sql`SHOW transaction_read_only`, sql`SHOW transaction_deferrable`],
      { readOnly: true, isolationLevel: 'RepeatableRead', deferrable: true });
    assert.deepEqual([level, mode, deferrable], [
      { transaction_isolation: 'repeatable read' }, { transaction_read_only: 'on' }, { transaction_deferrable: 'on' }]);
    // A constraint that is checked at COMMIT.
    await sql.query(`ALTER TABLE ${table} ADD COLUMN p int REFERENCES ${table} (id) DEFERRABLE INITIALLY DEFERRED`);
    await refused(sql.transaction([sql.query(`INSERT INTO ${table} VALUES (9, 99)`)]), '23503');
    assert.deepEqual(await sql.query(`SELECT count(*)::int AS n FROM ${table}`), [{ n: 1 }]);
    await sql.query(`DROP TABLE ${table}`);
    assert.deepEqual(await sql.transaction([]), []);
    // Far more than fits into a pipe, in both directions; each query counts, which FREE's rate would feel for seconds.
    const large = neon(url('umbrella'));
    const many = await large.transaction(Array.from({ length: 90 }, (_, i) => large`SELECT ${i}::int AS i, repeat('x', 5000) AS t, ${'y'.repeat(5000)}::text AS u`));
    assert.deepEqual(many.map(([row]) => row.i), Array.from({ length: 90 }, (_, i) => i));
  },

  http_nothing_is_left_for_the_next_request: async () => {
    const sql = neon(url('globex'));
    await sql`SET search_path TO nowhere`;
    await sql`BEGIN`;
    await sql`SELECT set_config('app.user', 'somebody', false)`;
    await sql`CREATE TEMP TABLE left_over (i int)`;
    await sql`SELECT pg_advisory_lock(42)`;
    for (let i = 0; i < 12; i++) {
      const [row] = await sql`SELECT current_setting('search_path') AS path, current_setting('app.user', true) AS who,
        to_regclass('pg_temp.left_over') AS t, pg_try_advisory_lock(42) AS free, pg_advisory_unlock(42) AS back`;
      assert.deepEqual(row, { path: '"$user", public', who: row.who, t: null, free: true, back: true });
      assert.ok(!row.who, row.who);
    }
  },

  http_tokens: async () => {
    const { token, service_key: key } = tenant('acme');
    assert.deepEqual(await neon(bare, { authToken: token })`SELECT 1 AS one`, [{ one: 1 }]);
    assert.deepEqual(await neon(bare, { authToken: async () => key })`SELECT 1 AS one`, [{ one: 1 }]);
    assert.deepEqual(await neon(bare, { password: async () => token })`SELECT 1 AS one`, [{ one: 1 }]);
    await refused(neon(bare, { authToken: 'nonsense' })`SELECT 1`, '28P01', (error) => {
      assert.match(error.message, /password authentication failed for user 'app'|password authentication failed for user "app"/);
    });
    await refused(neon('postgres://app:wrong@127.0.0.1/app')`SELECT 1`, '28P01');
    await refused(neon(bare.replace('app@', 'nobody@'), { authToken: token })`SELECT 1`, '28P01');
    await refused(neon(bare.replace(/app$/, 'nothing'), { authToken: token })`SELECT 1`, '3D000');
    await refused(neon(bare.replace(/app$/, 'postgres'), { authToken: token })`SELECT 1`, '3D000');
  },

  http_bodies_and_headers: async () => {
    const query = { query: 'SELECT 1 AS one', params: [] };
    const good = await post('acme', query);
    assert.equal(good.status, 200);
    assert.equal(good.headers.get('content-type'), 'application/json');
    assert.equal(good.headers.get('access-control-allow-origin'), '*');
    assert.match(good.headers.get('neon-request-id'), /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/);
    assert.deepEqual(good.json.rows, [{ one: 1 }]);
    for (const [body, headers] of [
      ['', {}], ['{', {}], ['[]', {}], ['{"query":1}', {}], ['{"query":"x","params":null}', {}], ['null', {}],
      [query, { 'Neon-Connection-String': 'nonsense' }], [query, { 'Neon-Connection-String': 'mysql://a:b@c/d' }],
      [query, { 'Neon-Batch-Isolation-Level': 'serializable' }],
    ]) {
      const bad = await post('acme', body, headers);
      assert.equal(bad.status, 400, JSON.stringify([body, headers]));
      assert.equal(Object.keys(bad.json).length, 17, bad.text);
      assert.equal(bad.headers.get('access-control-allow-origin'), '*');
    }
    const batch = await post('acme', { queries: [query] }, { 'Neon-Batch-Read-Only': 'true', 'Neon-Batch-Isolation-Level': 'Serializable', 'Neon-Batch-Deferrable': 'no' });
    assert.equal(batch.headers.get('neon-batch-read-only'), 'true');
    assert.equal(batch.headers.get('neon-batch-isolation-level'), 'Serializable');
    assert.equal(batch.headers.get('neon-batch-deferrable'), null);
    const large = await post('acme', { query: 'SELECT 1', params: [], x: 'y'.repeat((10 << 20) + 1) });
    assert.equal(large.status, 413);
    assert.match(large.json.message, /^request is too large \(max is 10485760 bytes\)$/);
    const preflight = await fetch(`http://${host}/sql`, { method: 'OPTIONS' });
    assert.equal(preflight.status, 200);
    assert.match(preflight.headers.get('access-control-allow-headers'), /Neon-Batch-Deferrable/);
    assert.equal(preflight.headers.get('access-control-allow-origin'), '*');
    const wrong = await fetch(`http://${host}/sql`);
    assert.deepEqual([wrong.status, await wrong.json()], [400, 'query is not supported']);
  },

  http_large_answers: async () => {
    const sql = neon(url('umbrella'));
    const [{ t }] = await sql`SELECT repeat('x', 5000000) AS t`;
    assert.equal(t.length, 5000000);
    const rows = await sql`SELECT i, repeat('y', 100) AS t FROM generate_series(1, 20000) i`;
    assert.equal(rows.length, 20000);
    await refused(neon(url('acme'))`SELECT repeat('x', 1000000) FROM generate_series(1, 11)`, '54000', (error) => {
      assert.match(error.message, /response is too large \(max is 10485760 bytes\)/);
    });
  },

  http_own_types: async () => {
    const sql = neon(url('acme'));
    const name = unique();
    await sql.query(`CREATE TYPE ${name} AS ENUM ('a', 'b c')`);
    for (let i = 0; i < 2; i++) {
      const { json } = await post('acme', { query: `SELECT 'a'::${name} AS e, '{a,NULL,"b c"}'::${name}[] AS l`, params: [] });
      assert.deepEqual(json.rows, [{ e: 'a', l: ['a', null, 'b c'] }]);
    }
    await sql.query(`DROP TYPE ${name}`);
  },

  http_a_request_that_is_aborted_is_cancelled: async () => {
    const sql = neon(url('umbrella'));
    const table = unique();
    await sql.query(`CREATE TABLE ${table} (i int)`);
    const running = async () => (await sql.query(`SELECT count(*)::int AS n FROM pg_stat_activity WHERE query LIKE '%/*${table}*/%' AND query NOT LIKE '%pg_stat_activity%' AND state = 'active'`))[0].n;
    const stop = new AbortController();
    const asked = post('umbrella', { query: `WITH w AS (SELECT pg_sleep(30)) INSERT INTO ${table} SELECT 1 FROM w /*${table}*/`, params: [] }, {}, { signal: stop.signal });
    while ((await running()) === 0) await new Promise((next) => setTimeout(next, 20));
    stop.abort();
    await assert.rejects(asked);
    const began = Date.now();
    while ((await running()) > 0) await new Promise((next) => setTimeout(next, 20));
    assert.ok(Date.now() - began < 5000);
    assert.deepEqual(await sql.query(`SELECT * FROM ${table}`), []);
    await sql.query(`DROP TABLE ${table}`);
  },

  http_limits: async () => {
    const sql = neon(url('acme'));
    await refused(sql`SELECT pg_sleep(30)`, '57014', (error) => {
      assert.match(error.detail, /limit=statement_timeout tier=FREE max_ms=10000/);
    });
    // The burst of FREE is 100 requests, 50 a second are let in.
    const answers = await Promise.all(Array.from({ length: 300 }, () => post('acme', { query: 'SELECT 1', params: [] })));
    const no = answers.filter((answer) => answer.status !== 200);
    assert.ok(no.length > 0);
    for (const answer of no) {
      assert.equal(answer.status, 400);
      assert.ok(['53300', '53400'].includes(answer.json.code), answer.text);
      assert.ok(answer.json.hint && answer.json.severity, answer.text);
    }
    assert.ok(no.some((answer) => Number(answer.headers.get('retry-after')) >= 1));
    await new Promise((next) => setTimeout(next, 2500));
  },

  http_more_requests_than_connections: async () => {
    const sql = neon(url('globex'));
    const rows = await Promise.all(Array.from({ length: 60 }, (_, i) => sql`SELECT ${i}::int AS i, pg_sleep(0.01)`));
    assert.deepEqual(rows.map(([row]) => row.i), Array.from({ length: 60 }, (_, i) => i));
  },

  socket_pool_and_client: async () => {
    const pool = new Pool({ connectionString: url('initech'), max: 5 });
    const rows = await Promise.all(Array.from({ length: 20 }, (_, i) => pool.query('SELECT $1::int AS i', [i])));
    assert.deepEqual(rows.map((r) => r.rows[0].i), Array.from({ length: 20 }, (_, i) => i));
    const client = await pool.connect();
    await client.query('BEGIN');
    await client.query('CREATE TEMP TABLE kept (i int) ON COMMIT DROP');
    await client.query('INSERT INTO kept VALUES (1)');
    assert.deepEqual((await client.query('SELECT * FROM kept')).rows, [{ i: 1 }]);
    await client.query('COMMIT');
    client.release();
    await pool.end();
  },

  socket_login: async () => {
    for (const pipelineConnect of ['password', false]) {
      const options = { connectionString: undefined, host: '127.0.0.1', user: 'app', database: 'app' };
      const make = (more) => {
        const client = new Client({ ...options, ...more });
        client.neonConfig.pipelineConnect = pipelineConnect;
        client.on('error', () => {});
        return client;
      };
      const good = make({ password: async () => tenant('acme').token });
      await good.connect();
      assert.deepEqual((await good.query('SELECT 1 AS one')).rows, [{ one: 1 }]);
      await good.end();
      for (const [more, code] of [
        [{ password: 'wrong' }, '28P01'],
        [{ password: tenant('acme').token, user: 'nobody' }, '28P01'],
        [{ password: tenant('acme').token, database: 'nothing' }, '3D000'],
      ]) {
        const client = make(more);
        const tried = (async () => {
          await client.connect();
          await client.query('SELECT 1');
        })();
        await refused(tried, code, (error) => assert.equal(error.severity, 'FATAL'));
      }
    }
  },

  socket_large_and_listen: async () => {
    await withClient('initech', async (client) => {
      const text = 'x'.repeat(3 << 20);
      const { rows } = await client.query('SELECT $1::text AS t', [text]);
      assert.equal(rows[0].t.length, text.length);
      const heard = new Promise((resolve) => client.once('notification', (note) => resolve(note.payload)));
      await client.query('LISTEN suite');
      await neon(url('initech'))`SELECT pg_notify('suite', 'hello')`;
      assert.equal(await heard, 'hello');
      await refused(client.query('SELECT 1/0'), '22012');
      assert.deepEqual((await client.query('SELECT 2 AS two')).rows, [{ two: 2 }]);
    });
  },

  socket_frames: async () => {
    // Any path, several messages in one frame, one message in many frames; text is a fault.
    const startup = Buffer.from('\0\0\0\0\0\x03\0\0user\0app\0database\0app\0\0', 'latin1');
    startup.writeInt32BE(startup.length, 0);
    const secret = Buffer.from(tenant('acme').token + '\0');
    const password = Buffer.concat([Buffer.from('p\0\0\0\0'), secret]);
    password.writeInt32BE(secret.length + 4, 1);
    const query = Buffer.from('Q\0\0\0\x0dSELECT 1\0');
    const all = Buffer.concat([startup, password, query]);
    for (const [where, cut] of [['/v1', all.length], ['/v2?address=x:1', 1], ['/sql', 7], ['/', 100]]) {
      const socket = new ws(`ws://${host}${where}`, { perMessageDeflate: true });
      const frames = [];
      await new Promise((resolve, reject) => {
        socket.on('error', reject);
        socket.on('open', () => {
          for (let at = 0; at < all.length; at += cut) socket.send(all.subarray(at, at + cut));
        });
        socket.on('message', (frame) => {
          frames.push(frame);
          if (Buffer.concat(frames).toString('latin1').includes('SELECT 1')) resolve();
        });
      });
      assert.equal(socket.extensions, '');
      assert.deepEqual([...frames[0]], [82, 0, 0, 0, 8, 0, 0, 0, 3], 'the request for a password alone');
      assert.equal(frames[1].subarray(-6).toString('latin1'), 'Z\0\0\0\x05I', 'the greeting in one frame');
      assert.equal(String.fromCharCode(frames[1][0], frames[2][0]), 'RT');
      socket.close();
    }
    const socket = new ws(`ws://${host}/v2`);
    await new Promise((resolve, reject) => {
      socket.on('open', () => socket.send('text'));
      socket.on('close', resolve);
      setTimeout(() => reject(new Error('it stays open')), 20_000).unref();
    });
  },

  socket_vanishing_clients_cancel: async () => {
    const mark = unique();
    const client = new Client({ connectionString: url('umbrella') });
    client.on('error', () => {});
    await client.connect();
    client.query(`SELECT pg_sleep(30) /*${mark}*/`).catch(() => {});
    const sql = neon(url('umbrella'));
    const running = async () => (await sql.query(`SELECT count(*)::int AS n FROM pg_stat_activity WHERE query LIKE '%/*${mark}*/%' AND query NOT LIKE '%pg_stat_activity%' AND state = 'active'`))[0].n;
    while ((await running()) === 0) await new Promise((next) => setTimeout(next, 20));
    client.connection.stream.ws?.terminate?.();
    client.connection.stream.destroy?.();
    const began = Date.now();
    while ((await running()) > 0) await new Promise((next) => setTimeout(next, 20));
    assert.ok(Date.now() - began < 8000);
  },

  two_tenants: async () => {
    const mine = neon(url('acme'));
    const theirs = neon(url('globex'));
    const table = unique();
    await mine.query(`CREATE TABLE ${table} (secret text)`);
    await mine.query(`INSERT INTO ${table} VALUES ('acme only')`);
    await refused(theirs.query(`SELECT * FROM ${table}`), '42P01');
    const [{ db, me }] = await theirs`SELECT current_database() AS db, current_user AS me`;
    const [other] = await mine`SELECT current_database() AS db, current_user AS me`;
    assert.notEqual(db, other.db);
    assert.notEqual(me, other.me);
    assert.doesNotMatch(JSON.stringify([db, me, other]), /acme|globex/);
    // With its own token and the other's names, and with names of the server.
    for (const name of [other.db, db, 'postgres', 'template1', 'app@', 'app@main', 'app@../x', '']) {
      const string = `postgres://app:${tenant('globex').token}@127.0.0.1/${encodeURIComponent(name)}`;
      const { status, json } = await post('globex', { query: 'SELECT current_database()', params: [] }, { 'Neon-Connection-String': string });
      assert.equal(status, 400, name);
      assert.ok(['3D000', ''].includes(json.code), json.code);
    }
    for (const attack of [`SET ROLE "${other.me}"`, `SET SESSION AUTHORIZATION "${other.me}"`, `SET ROLE postgres`, 'CREATE ROLE x SUPERUSER', "COPY (SELECT 1) TO PROGRAM 'true'", 'CREATE DATABASE x', `ALTER DATABASE "${other.db}" RENAME TO y`]) {
      await assert.rejects(theirs.query(attack), (error) => Boolean(error.code), attack);
    }
    // The main home is another database than the Neon home; acme has its Postgres port at the latter.
    const main = new pg.Client({ connectionString: tenant('globex').urls.postgres, ssl: false });
    await main.connect();
    const home = (await main.query('SELECT current_database() AS db')).rows[0].db;
    await main.end();
    assert.notEqual(home, db);
    await mine.query(`DROP TABLE ${table}`);
  },

  branches: async () => {
    const rest = async (method, path = '', body) => {
      const response = await fetch(`http://${host}/neon/branches${path}`, {
        method,
        headers: { Authorization: `Bearer ${tenant('globex').token}` },
        body: body && JSON.stringify(body),
      });
      return { status: response.status, json: response.status === 204 ? undefined : await response.json() };
    };
    for (const { name } of (await rest('GET')).json.branches) await rest('DELETE', `/${name}`);
    const sql = neon(url('globex'));
    const table = unique();
    await sql.query(`CREATE TABLE ${table} (i int)`);
    const made = await rest('POST', '', { name: 'preview' });
    assert.equal(made.status, 201, JSON.stringify(made.json));
    const there = url('globex').replace(/app$/, encodeURIComponent(made.json.database));
    await neon(there).query(`INSERT INTO ${table} VALUES (1)`);
    assert.deepEqual(await sql.query(`SELECT * FROM ${table}`), []);
    const client = new Client({ connectionString: there });
    client.on('error', () => {});
    await client.connect();
    assert.deepEqual((await client.query(`SELECT * FROM ${table}`)).rows, [{ i: 1 }]);
    await client.end();
    assert.equal((await rest('DELETE', '/preview')).status, 204);
    await refused(neon(there)`SELECT 1`, '3D000');
    await sql.query(`DROP TABLE ${table}`);
  },

  one_home_by_every_way_in: async () => {
    // acme's Postgres port leads to its Neon home; initech's to a database of its own.
    const table = unique();
    for (const org of ['acme', 'initech']) {
      const sql = neon(url(org));
      await sql.query(`CREATE TABLE ${table} (i int)`);
      await sql.query(`INSERT INTO ${table} VALUES (7)`);
      const client = new pg.Client({ connectionString: tenant(org).urls.postgres, ssl: false });
      await client.connect();
      if (org === 'acme') assert.deepEqual((await client.query(`SELECT i FROM ${table}`)).rows, [{ i: 7 }]);
      else await refused(client.query(`SELECT i FROM ${table}`), '42P01');
      await client.end();
      await sql.query(`DROP TABLE ${table}`);
    }
  },

  drizzle_over_both: async () => {
    const { drizzle: overHttp } = require('drizzle-orm/neon-http');
    const { drizzle: overSocket } = require('drizzle-orm/neon-serverless');
    const { pgTable, serial, text, timestamp } = require('drizzle-orm/pg-core');
    const { eq, sql } = require('drizzle-orm');
    const name = unique();
    const users = pgTable(name, { id: serial('id').primaryKey(), name: text('name').notNull(), at: timestamp('at').defaultNow() });
    const db = overHttp(neon(url('initech')));
    await db.execute(sql.raw(`CREATE TABLE ${name} (id serial PRIMARY KEY, name text NOT NULL, at timestamp DEFAULT now())`));
    const [made] = await db.insert(users).values({ name: 'Ada' }).returning();
    assert.equal(made.name, 'Ada');
    assert.ok(made.at instanceof Date);
    const [one, two] = await db.batch([db.select().from(users), db.select({ n: users.name }).from(users).where(eq(users.id, made.id))]);
    assert.equal(one.length, 1);
    assert.deepEqual(two, [{ n: 'Ada' }]);
    const withToken = overHttp(neon(bare)).$withAuth(tenant('initech').token);
    assert.equal((await withToken.select().from(users)).length, 1);
    const pool = new Pool({ connectionString: url('initech'), max: 2 });
    const socket = overSocket(pool);
    await socket.transaction(async (tx) => {
      await tx.insert(users).values({ name: 'Bob' });
      assert.equal((await tx.select().from(users)).length, 2);
    });
    await socket.execute(sql.raw(`DROP TABLE ${name}`));
    await pool.end();
  },

  kysely_over_a_socket: async () => {
    const { Kysely, PostgresDialect } = await import('kysely');
    const pool = new Pool({ connectionString: url('initech'), max: 2 });
    const db = new Kysely({ dialect: new PostgresDialect({ pool }) });
    const name = unique();
    await db.schema.createTable(name).addColumn('id', 'serial', (c) => c.primaryKey()).addColumn('name', 'text').execute();
    await db.transaction().execute(async (tx) => {
      await tx.insertInto(name).values({ name: 'Ada' }).execute();
    });
    assert.deepEqual(await db.selectFrom(name).select('name').execute(), [{ name: 'Ada' }]);
    await db.schema.dropTable(name).execute();
    await db.destroy();
  },

  prisma_s_adapters: async () => {
    // What Prisma's client calls: both of its adapters for this driver, and the errors that it has words of its own for.
    const { PrismaNeon, PrismaNeonHttp } = require('@prisma/adapter-neon');
    const query = (sql, ...args) => ({ sql, args, argTypes: args.map(() => ({ scalarType: 'string', arity: 'scalar' })) });
    const name = unique();
    const overHttp = await new PrismaNeonHttp(url('initech'), {}).connect();
    const overSocket = await new PrismaNeon({ connectionString: url('initech'), max: 2 }).connect();
    await overHttp.executeRaw(query(`CREATE TABLE ${name} (id int PRIMARY KEY, name text)`));
    // Over HTTP the driver's own error goes through; over a socket it becomes one of Prisma's kinds.
    for (const [id, adapter, twice] of [[1, overHttp, (error) => error.code === '23505'], [2, overSocket, (error) => error.cause?.kind === 'UniqueConstraintViolation']]) {
      assert.equal(await adapter.executeRaw(query(`INSERT INTO ${name} VALUES ($1::int, $2)`, String(id), 'Ada')), 1);
      const found = await adapter.queryRaw(query(`SELECT id, name FROM ${name} WHERE id = $1::int`, String(id)));
      assert.deepEqual([found.columnNames, found.rows], [['id', 'name'], [[id, 'Ada']]]);
      await assert.rejects(adapter.executeRaw(query(`INSERT INTO ${name} VALUES ($1::int, 'x')`, String(id))), twice);
    }
    const tx = await overSocket.startTransaction('SERIALIZABLE');
    await tx.executeRaw(query(`INSERT INTO ${name} VALUES (3, 'gone')`));
    // As Prisma's engine ends one: the statement, then the word to the adapter.
    await tx.executeRaw(query('ROLLBACK'));
    await tx.rollback();
    assert.deepEqual((await overSocket.queryRaw(query(`SELECT count(*)::int AS n FROM ${name}`))).rows, [[2]]);
    await overSocket.dispose();
    await overHttp.executeRaw(query(`DROP TABLE ${name}`));
  },

  the_case_file: async () => {
    const list = JSON.parse(fs.readFileSync(path.join(__dirname, 'neon_cases.json'), 'utf8'));
    assert.ok(list.length >= 100, `${list.length} cases`);
    const faults = [];
    for (const one of list) {
      try {
        await checkCase(one);
      } catch (error) {
        faults.push(`${one.name}: ${error.message}`);
      }
    }
    assert.deepEqual(faults, []);
  },

  connections_are_kept_alive: async () => {
    // One connection, many requests; then a request of HTTP/1.0 manners.
    const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
    const ports = new Set();
    for (let i = 0; i < 5; i++) {
      await new Promise((resolve, reject) => {
        const request = http.request({ host: '127.0.0.1', port: ready.ports.http, path: '/sql', method: 'POST', agent, headers: { 'Neon-Connection-String': url('umbrella') } }, (response) => {
          ports.add(response.socket.localPort);
          response.resume().on('end', resolve);
        });
        request.on('error', reject);
        request.end(JSON.stringify({ query: 'SELECT 1', params: [] }));
      });
    }
    agent.destroy();
    assert.equal(ports.size, 1);
  },
};

async function main() {
  let failed = 0;
  for (const [name, run] of Object.entries(cases)) {
    if (only.length && !only.includes(name)) continue;
    let timer;
    try {
      const late = new Promise((_, reject) => {
        timer = setTimeout(() => reject(new Error(`longer than ${CASE_MS} ms`)), CASE_MS);
      });
      await Promise.race([run(), late]);
      console.log(`PASS ${name}`);
    } catch (error) {
      failed++;
      console.log(`FAIL ${name}: ${String(error.stack).replace(/\s+/g, ' ').slice(0, 600)}`);
    } finally {
      clearTimeout(timer);
    }
  }
  process.exit(failed ? 1 : 0);
}

main();
