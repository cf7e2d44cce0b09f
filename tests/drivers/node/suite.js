// node-postgres: Pool, Client, named statements, cursors and streams.
'use strict';

const fs = require('node:fs');
const assert = require('node:assert/strict');
const { Client, Pool } = require('pg');
const Cursor = require('pg-cursor');
const QueryStream = require('pg-query-stream');

const ready = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'));
const only = process.argv.slice(3);
const ORG = 'initech';
// The longest case moves a few megabytes.
const CASE_MS = 60_000;

function url(org, parts = {}) {
  const address = new URL(ready.tenants.find((t) => t.org_id === org).urls.postgres.replace(/^postgres:/, 'http:'));
  const database = parts.database ?? address.pathname.slice(1);
  return {
    host: address.hostname,
    port: Number(address.port),
    user: parts.user ?? address.username,
    password: parts.password ?? decodeURIComponent(address.password),
    database,
    ssl: false,
    connectionTimeoutMillis: 10_000,
  };
}

async function withClient(run, options = {}) {
  const client = new Client({ ...url(ORG), ...options });
  await client.connect();
  try {
    return await run(client);
  } finally {
    await client.end();
  }
}

async function refused(promise, code) {
  await assert.rejects(promise, (error) => {
    assert.equal(error.code, code, error.message);
    return true;
  });
}

const cases = {
  simple_and_parameters: () =>
    withClient(async (client) => {
      assert.deepEqual((await client.query('SELECT 1 AS one')).rows, [{ one: 1 }]);
      const { rows } = await client.query('SELECT $1::int AS i, $2::text AS t, $3::jsonb AS j, $4::bytea AS b, $5::text[] AS a', [
        7, "quo'te", { a: [1] }, Buffer.from([0, 255]), ['x', null],
      ]);
      assert.deepEqual(rows, [{ i: 7, t: "quo'te", j: { a: [1] }, b: Buffer.from([0, 255]), a: ['x', null] }]);
      const several = await client.query('SELECT 1; SELECT 2 AS two');
      assert.deepEqual(several.map((r) => r.rows.length), [1, 1]);
    }),

  queued_queries_come_back_in_order: () =>
    withClient(async (client) => {
      const results = await Promise.all(Array.from({ length: 200 }, (_, i) => client.query('SELECT $1::int AS i', [i])));
      assert.deepEqual(results.map((r) => r.rows[0].i), Array.from({ length: 200 }, (_, i) => i));
    }),

  named_statements: () =>
    withClient((one) =>
      withClient(async (two) => {
        for (let i = 0; i < 20; i++) {
          const a = await one.query({ name: 'same', text: 'SELECT $1::int + 1 AS n', values: [i] });
          const b = await two.query({ name: 'same', text: 'SELECT $1::int + 2 AS n', values: [i] });
          assert.deepEqual([a.rows[0].n, b.rows[0].n], [i + 1, i + 2]);
        }
      })),

  a_pool: async () => {
    const pool = new Pool({ ...url(ORG), max: 10 });
    const errors = [];
    pool.on('error', (error) => errors.push(error));
    const results = await Promise.all(Array.from({ length: 100 }, (_, i) => pool.query('SELECT $1::int AS i', [i])));
    assert.deepEqual(results.map((r) => r.rows[0].i), Array.from({ length: 100 }, (_, i) => i));
    const client = await pool.connect();
    await client.query('BEGIN');
    await client.query('CREATE TEMP TABLE x (a int) ON COMMIT DROP');
    await client.query('INSERT INTO x VALUES (1)');
    await client.query('ROLLBACK');
    client.release();
    await pool.end();
    assert.deepEqual(errors, []);
  },

  a_pool_wider_than_the_tier: async () => {
    const pool = new Pool({ ...url('acme'), max: 10 });
    const results = await Promise.all(Array.from({ length: 20 }, () => pool.query('SELECT pg_sleep(0.05)')));
    assert.equal(results.length, 20);
    await pool.end();
  },

  errors_carry_their_code: () =>
    withClient(async (client) => {
      await refused(client.query('SELECT 1/0'), '22012');
      await refused(client.query('SELEC'), '42601');
      await refused(client.query('SELECT $1::int', ['x']), '22P02');
      await refused(client.query({ name: 'bad', text: 'SELECT * FROM nowhere' }), '42P01');
      assert.equal((await client.query('SELECT 1 AS one')).rows[0].one, 1);
    }),

  refusals_at_login: async () => {
    await refused(new Client(url(ORG, { password: 'wrong' })).connect(), '28P01');
    await refused(new Client(url(ORG, { user: 'nobody' })).connect(), '28P01');
    await refused(new Client(url(ORG, { database: 'nothing_here' })).connect(), '3D000');
  },

  a_cursor: () =>
    withClient(async (client) => {
      const cursor = client.query(new Cursor('SELECT generate_series(1, 1000) AS i'));
      assert.equal((await cursor.read(10)).length, 10);
      assert.equal((await cursor.read(990)).at(-1).i, 1000);
      await cursor.close();
      const early = client.query(new Cursor('SELECT generate_series(1, 1000000) AS i'));
      await early.read(5);
      await early.close();
      assert.equal((await client.query('SELECT 1 AS one')).rows[0].one, 1);
    }),

  a_stream: () =>
    withClient(async (client) => {
      let sum = 0;
      for await (const row of client.query(new QueryStream('SELECT generate_series(1, $1::int) AS i', [20000]))) sum += row.i;
      assert.equal(sum, 200010000);
    }),

  notifications: () =>
    withClient((ear) =>
      withClient(async (mouth) => {
        const channel = `c_${process.pid}`;
        const heard = new Promise((resolve) => ear.once('notification', (note) => resolve(note.payload)));
        await ear.query(`LISTEN ${channel}`);
        await mouth.query('SELECT pg_notify($1, $2)', [channel, 'hello']);
        assert.equal(await heard, 'hello');
      })),

  startup_parameters: () =>
    withClient(
      async (client) => {
        const { rows } = await client.query("SELECT current_setting('application_name') AS a, current_setting('lock_timeout') AS l");
        assert.deepEqual(rows, [{ a: 'suite', l: '4321ms' }]);
      },
      { application_name: 'suite', options: '-c lock_timeout=4321' }),

  large_values: () =>
    withClient(async (client) => {
      const text = 'x'.repeat(5 << 20);
      const { rows } = await client.query('SELECT $1::text AS t', [text]);
      assert.equal(rows[0].t.length, text.length);
    }),
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
      console.log(`FAIL ${name}: ${String(error.message).replace(/\s+/g, ' ').slice(0, 400)}`);
    } finally {
      clearTimeout(timer);
    }
  }
  process.exit(failed ? 1 : 0);
}

main();
