// convex/react in a real Chromium before the proxy: a page that lists messages live, another organisation's that does
// not, and a limit that is met by one component while the others go on. Without a Chromium on this machine (Debian:
// apt-get install chromium) every case is skipped.
'use strict';

const fs = require('node:fs');
const http = require('node:http');
const os = require('node:os');
const path = require('node:path');
const assert = require('node:assert/strict');
const { spawn } = require('node:child_process');
const { randomUUID } = require('node:crypto');
const esbuild = require('esbuild');
const WebSocket = require('ws');
const { ConvexHttpClient } = require('convex/browser');
const { makeFunctionReference: ref } = require('convex/server');
const { organisations } = require('./organisations.js');

const ready = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'));
const only = process.argv.slice(3);
const base = ready.tenants[0].urls.convex;
const own = organisations(process.argv[2], 're');
const organisation = () => own.organisation((credential) => {
  const it = new ConvexHttpClient(base, { logger: false, skipConvexDeploymentUrlCheck: true, auth: credential });
  return it.query(ref('messages:list'), { channel: 'x' }).then(() => true, () => false);
});
const token = (org) => ready.tenants.find((tenant) => tenant.org_id === org).token;
const PATIENCE_MS = 30_000;

function chromium() {
  const folders = (process.env.PATH ?? '').split(':');
  const names = ['chromium', 'chromium-browser', 'google-chrome'];
  return names.flatMap((name) => folders.map((folder) => path.join(folder, name))).find((file) => fs.existsSync(file));
}

async function until(what, condition) {
  const deadline = Date.now() + PATIENCE_MS;
  for (;;) {
    const found = await condition();
    if (found) return found;
    if (Date.now() > deadline) throw new Error(`waited in vain: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 25));
  }
}

// The page's own server: another origin than the proxy's, as in life.
async function serve() {
  const built = await esbuild.build({
    entryPoints: [path.join(__dirname, 'react_page.jsx')], bundle: true, write: false, format: 'iife', jsx: 'transform',
    define: { 'process.env.NODE_ENV': '"production"' },
  });
  const html = '<!doctype html><meta charset="utf-8"><title>chat</title><style>body{font:16px sans-serif;margin:2em}.extra{display:none}.refused{color:#a00}</style><div id="page"></div><script src="/page.js"></script>';
  const server = http.createServer((request, response) => {
    const script = request.url === '/page.js';
    response.setHeader('content-type', script ? 'text/javascript' : 'text/html');
    response.end(script ? built.outputFiles[0].contents : html);
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  return server;
}

// A browser, spoken to by its own protocol (CDP).
class Browser {
  static async start(program) {
    const browser = new Browser();
    browser.folder = fs.mkdtempSync(path.join(os.tmpdir(), 'dynabase-chromium-'));
    const flags = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run', '--remote-debugging-port=0', `--user-data-dir=${browser.folder}`, 'about:blank'];
    browser.child = spawn(program, flags, { stdio: ['ignore', 'ignore', 'pipe'] });
    let said = '';
    browser.child.stderr.on('data', (text) => (said += text));
    const url = await until('the browser is there', () => /DevTools listening on (ws:\S+)/.exec(said)?.[1]);
    browser.socket = new WebSocket(url, { perMessageDeflate: false });
    await new Promise((resolve, reject) => browser.socket.once('open', resolve).once('error', reject));
    browser.waiting = new Map();
    browser.socket.on('message', (text) => {
      const { id, result, error } = JSON.parse(text);
      if (id === undefined) return;
      const { resolve, reject } = browser.waiting.get(id);
      browser.waiting.delete(id);
      if (error) reject(new Error(error.message));
      else resolve(result);
    });
    return browser;
  }

  ask(method, params = {}, sessionId) {
    const id = (this.last = (this.last ?? 0) + 1);
    this.socket.send(JSON.stringify({ id, method, params, sessionId }));
    return new Promise((resolve, reject) => this.waiting.set(id, { resolve, reject }));
  }

  async open(url) {
    const { targetId } = await this.ask('Target.createTarget', { url });
    const { sessionId } = await this.ask('Target.attachToTarget', { targetId, flatten: true });
    const page = {
      ask: (method, params) => this.ask(method, params, sessionId),
      run: async (expression) => {
        const { result, exceptionDetails } = await this.ask('Runtime.evaluate', { expression, returnByValue: true, awaitPromise: true }, sessionId);
        if (exceptionDetails) throw new Error(exceptionDetails.exception?.description ?? exceptionDetails.text);
        return result.value;
      },
      close: () => this.ask('Target.closeTarget', { targetId }),
    };
    return page;
  }

  async stop() {
    this.socket.close();
    const gone = new Promise((resolve) => this.child.once('exit', resolve));
    this.child.kill('SIGKILL');
    await gone;
    fs.rmSync(this.folder, { recursive: true, force: true, maxRetries: 5, retryDelay: 100 });
  }
}

let browser;
let server;

async function page(org, channel, { extra = 0, credential = token(org) } = {}) {
  const words = new URLSearchParams({ base, token: credential, org, channel, extra });
  const opened = await browser.open(`http://127.0.0.1:${server.address().port}/#${words}`);
  opened.call = (kind, name, args) => opened.run(`call(${JSON.stringify(kind)}, ${JSON.stringify(name)}, ${JSON.stringify(args)})`);
  // Many at once, `at` a time.
  opened.calls = (kind, name, args, count, at) => opened.run(`(async () => {
    const all = [];
    while (all.length < ${count}) all.push(...(await Promise.all(Array.from({ length: ${at} }, () => call(${JSON.stringify(kind)}, ${JSON.stringify(name)}, ${JSON.stringify(args)})))));
    return all;
  })()`);
  opened.refused = () => opened.run(`[...document.querySelectorAll('.refused')].map((it) => [it.dataset.code, it.dataset.limit])`);
  opened.connections = () => opened.run(`document.querySelector('footer').dataset.count`);
  opened.messages = () => opened.run(`[...document.querySelectorAll('#main li')].map((it) => it.textContent)`);
  await until(`${org}'s page is live`, () => opened.run(`document.querySelector('footer')?.textContent === 'live' && !document.querySelector('#main .loading')`));
  return opened;
}

const client = (org) => {
  const it = new ConvexHttpClient(base, { logger: false, skipConvexDeploymentUrlCheck: true });
  it.setAuth(token(org));
  return it;
};

const cases = {
  async a_page_lists_messages_live() {
    const channel = `r${randomUUID().slice(0, 8)}`;
    const [mine, theirs] = [await page('acme', channel), await page('globex', channel)];
    // The shared deployment keeps organisations apart too.
    const [shared, neighbour] = [await page('initech', channel), await page('umbrella', channel)];
    assert.deepEqual(await mine.messages(), []);
    await client('acme').mutation(ref('messages:send'), { channel, body: 'from elsewhere' });
    await until('it is on the page', async () => (await mine.messages()).includes('from elsewhere'));
    await mine.run(`(() => { document.querySelector('input').value = 'from the page'; document.querySelector('button').click(); })()`);
    await until('what the page sent is there', async () => (await mine.messages()).length === 2);
    const seen = await client('acme').query(ref('messages:list'), { channel });
    assert.deepEqual(seen.map((it) => it.body), ['from elsewhere', 'from the page']);
    await client('initech').mutation(ref('messages:send'), { channel, body: 'for initech' });
    await until('it is on initech\'s page', async () => (await shared.messages()).includes('for initech'));
    assert.deepEqual([await theirs.messages(), await neighbour.messages(), await mine.messages()], [[], [], ['from elsewhere', 'from the page']]);
    if (process.env.DYNABASE_SCREENSHOT) {
      const { data } = await mine.ask('Page.captureScreenshot', { format: 'png' });
      fs.writeFileSync(process.env.DYNABASE_SCREENSHOT, Buffer.from(data, 'base64'));
    }
    for (const it of [mine, theirs, shared, neighbour]) await it.close();
  },

  async one_query_too_many_fails_in_its_own_component() {
    // FREE has 50 subscriptions per socket: the page's own and 52 more are three too many.
    const channel = `r${randomUUID().slice(0, 8)}`;
    const one = await page('acme', channel, { extra: 52 });
    await until('three are refused', async () => (await one.refused()).length === 3);
    assert.deepEqual(await one.refused(), Array(3).fill(['quota_exceeded', 'subscriptions']));
    assert.equal(await one.run(`document.querySelectorAll('.messages').length`), 50);
    await client('acme').mutation(ref('messages:send'), { channel, body: 'still live' });
    await until('the others go on', async () => (await one.messages()).includes('still live'));
    assert.equal(await one.connections(), '1', 'without one reconnect');
    if (process.env.DYNABASE_SCREENSHOT) {
      await one.run(`document.querySelectorAll('.extra').forEach((it) => it.querySelector('.refused') && (it.style.display = 'block'))`);
      const { data } = await one.ask('Page.captureScreenshot', { format: 'png' });
      fs.writeFileSync(process.env.DYNABASE_SCREENSHOT.replace(/(\.png)?$/, '-refused.png'), Buffer.from(data, 'base64'));
    }
    await one.close();
  },

  async calls_over_a_limit_fail_alone_and_the_page_goes_on() {
    const org = await organisation();
    const channel = `r${randomUUID().slice(0, 8)}`;
    const one = await page(org, channel, { credential: own.token(org) });
    const busy = await one.calls('action', 'messages:slow', { ms: 2000 }, 10, 10);
    assert.deepEqual(busy.flatMap(({ refused }) => (refused ? [[refused.limit, refused.max]] : [])), Array(2).fill(['in_flight', 8]));
    const large = await one.call('mutation', 'messages:send', { channel, body: 'y'.repeat(1 << 20) });
    assert.equal(large.refused?.code, 'payload_too_large', JSON.stringify(large).slice(0, 200));
    // Eight at a time, as many as may be under way.
    const sent = await one.calls('mutation', 'messages:send', { channel, body: 'x' }, 120, 8);
    const over = sent.filter((it) => it.refused);
    assert.ok(over.length > 0 && over.every((it) => it.refused.limit === 'rate'), JSON.stringify(over.slice(0, 3)));
    await until('what was let in', async () => (await one.messages()).length === 120 - over.length);
    await until('it goes on', async () => 'value' in (await one.call('mutation', 'messages:send', { channel, body: 'later' })));
    assert.deepEqual([await one.connections(), await one.refused()], ['1', []], 'without one reconnect');
    await one.close();
  },

  async a_suspended_organisation_s_page_says_so() {
    const org = await organisation();
    const one = await page(org, 'x', { credential: own.token(org) });
    await own.write({ _id: org, tier: 'FREE', status: 'suspended', epoch: 2 });
    await until('it says so', async () => (await one.refused())[0]?.[0] === 'suspended');
    assert.equal((await one.call('mutation', 'messages:send', { channel: 'x', body: 'y' })).refused.code, 'suspended');
    await own.write({ _id: org, tier: 'FREE', status: 'active', epoch: 3 });
    await until('it lives again', async () => 'value' in (await one.call('mutation', 'messages:send', { channel: 'x', body: 'y' })));
    await one.close();
  },

  async a_page_without_room_or_without_a_token_says_so() {
    const org = await organisation();
    const full = await Promise.all(Array.from({ length: 25 }, async () => {
      const socket = new WebSocket(`${base.replace('http', 'ws')}/api/1.48.0/sync`);
      await new Promise((resolve, reject) => socket.once('open', resolve).once('error', reject));
      const answered = new Promise((resolve) => socket.once('message', resolve));
      socket.send(JSON.stringify({ type: 'Connect', sessionId: randomUUID(), connectionCount: 0, lastCloseReason: null, clientTs: 0 }));
      socket.send(JSON.stringify({ type: 'Authenticate', baseVersion: 0, tokenType: 'User', value: own.token(org) }));
      await answered;
      return socket;
    }));
    const [late, nobody] = [await page(org, 'x', { credential: own.token(org) }), await page(org, 'x', { credential: '' })];
    await until('no room', async () => (await late.refused())[0]?.[1] === 'client_sockets');
    await until('no token', async () => (await nobody.refused())[0]?.[0] === 'unauthenticated');
    full.forEach((it) => it.terminate());
    await until('it comes in by itself', async () => 'value' in (await late.call('mutation', 'messages:send', { channel: 'x', body: 'y' })));
    for (const it of [late, nobody]) await it.close();
  },

  async a_page_whose_socket_is_cut_goes_on() {
    const channel = `r${randomUUID().slice(0, 8)}`;
    const one = await page('globex', channel);
    for (const count of [1, 2]) {
      const cut = await fetch(`${ready.convex.deployments.globex}/double/drop`, { method: 'POST', headers: { authorization: `Convex ${ready.convex.admin_key}` } });
      assert.equal(cut.status, 200);
      assert.ok('value' in (await one.call('mutation', 'messages:send', { channel, body: `${count}` })));
      await until('it is there', async () => (await one.messages()).length === count);
    }
    assert.ok(Number(await one.connections()) > 1);
    await one.close();
  },
};

(async () => {
  const program = chromium();
  let failed = 0;
  if (program) [browser, server] = [await Browser.start(program), await serve()];
  for (const [name, step] of Object.entries(cases)) {
    if (only.length > 0 && !only.includes(name)) continue;
    if (!program) {
      console.log(`SKIP ${name}: no Chromium here`);
      continue;
    }
    try {
      await step();
      console.log(`PASS ${name}`);
    } catch (error) {
      failed += 1;
      console.log(`FAIL ${name}: ${String(error.stack).replace(/\s+/g, ' ').slice(0, 500)}`);
    }
  }
  server?.close();
  await browser?.stop();
  process.exit(failed > 0 ? 1 : 0);
})();
