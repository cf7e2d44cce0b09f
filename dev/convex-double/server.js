// A double of Convex's backend, for development and tests where the real one can't be had: real Convex functions
// (run by the npm package `convex-test`) behind Convex's HTTP API and sync protocol. It forgives nothing that the
// real one does not: versions, repeated ids, token audiences. It keeps everything in memory.
//
//     node server.js CONFIG.json     {"deployments": [{"name", "port", "origin", "adminKey", "auth": {…}, "chunkBytes"?}]}
//
// `auth` is the `customJwt` provider of a convex/auth.config.ts. Beyond Convex' own paths, for tests, with the admin
// key: POST /double/drop cuts every socket; POST /double/lose-reply commits the next mutation and cuts before answering.
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { createHash, randomUUID } from "node:crypto";
import { convexTest } from "convex-test";
import { makeFunctionReference } from "convex/server";
import { convexToJson, jsonToConvex } from "convex/values";
import { createRemoteJWKSet, jwtVerify } from "jose";
import { WebSocketServer } from "ws";

const ZERO = "AAAAAAAAAAA=";
const PING_AFTER_MS = 15_000;
const LISTEN_WITHIN_MS = 10_000;
const MUTATIONS_KEPT = 10_000;
const modules = {
  "./convex/_generated/api.js": () => import("./convex/_generated/api.js"),
  "./convex/messages.js": () => import("./convex/messages.js"),
  "./convex/http.js": () => import("./convex/http.js"),
};

class HttpError extends Error {
  constructor(status, code, message) {
    super(message);
    Object.assign(this, { status, code });
  }
}

// The function behind "messages:list", "messages.js:list" or "messages/list"; internal ones for administrators only.
async function find(path, kind, admin) {
  const [module, name] = path.replace(/\.js(?=:|$)/, "").split(":");
  const load = modules[`./convex/${module}.js`];
  const found = load && (await load())[name ?? "default"];
  if (!found || !(found.isPublic || admin)) throw new Error(`Could not find public function for '${path}'.`);
  const is = found.isQuery ? "query" : found.isMutation ? "mutation" : "action";
  if (kind && is !== kind) throw new Error(`Trying to execute ${path} as ${kind}, but it is defined as ${is}.`);
  return { reference: makeFunctionReference(`${module}:${name ?? "default"}`), kind: is };
}

// Nested claims under dotted names, as in `getUserIdentity()`.
function flatten(value, prefix, into) {
  for (const [key, it] of Object.entries(value)) {
    if (it && typeof it === "object" && !Array.isArray(it)) flatten(it, `${prefix}${key}.`, into);
    else into[prefix + key] = it;
  }
  return into;
}

class Deployment {
  constructor(config) {
    Object.assign(this, config);
    this.chunkBytes ??= 5_000_000;
    this.test = convexTest({ modules });
    this.sockets = new Set();
    this.committed = new Map();
    this.files = new Map();
    this.ts = 0n;
    this.queue = Promise.resolve();
    this.keys = createRemoteJWKSet(new URL(config.auth.jwks), { cooldownDuration: 1000 });
    this.touch();
  }

  touch() {
    const now = BigInt(Date.now()) * 1_000_000n;
    this.ts = now > this.ts ? now : this.ts + 1n;
  }

  encodedTs() {
    const bytes = Buffer.alloc(8);
    bytes.writeBigUInt64LE(this.ts);
    return bytes.toString("base64");
  }

  // Queries and mutations run one after the other; actions don't.
  exclusively(work) {
    const done = this.queue.then(work);
    this.queue = done.catch(() => {});
    return done;
  }

  async verify(token) {
    const { issuer, applicationID, algorithm } = this.auth;
    const { payload } = await jwtVerify(token, this.keys, { issuer, audience: applicationID, algorithms: [algorithm], clockTolerance: 5, requiredClaims: ["sub", "iss", "exp"] });
    const { iss, sub, aud, exp, iat, ...claims } = payload;
    return { exp, claims: { tokenIdentifier: `${iss}|${sub}`, issuer: iss, subject: sub, ...flatten(claims, "", {}) } };
  }

  // → {status:"success", value} or {status:"error", errorMessage, errorData?}, as the HTTP API says it
  async call(kind, path, args, caller) {
    try {
      const { reference, kind: is } = await find(path, kind, caller.admin);
      const as = caller.claims ? this.test.withIdentity(caller.claims) : this.test;
      const run = async () => as[is](reference, jsonToConvex((Array.isArray(args) ? args[0] : args) ?? {}));
      const value = is === "action" ? await run() : await this.exclusively(run);
      return { wrote: is !== "query", answer: { status: "success", value: JSON.parse(this.own(JSON.stringify(convexToJson(value ?? null)))), logLines: [] } };
    } catch (error) {
      const answer = { status: "error", errorMessage: String(error.message ?? error), logLines: [] };
      if (error?.data !== undefined) answer.errorData = typeof error.data === "string" ? JSON.parse(error.data) : convexToJson(error.data);
      return { wrote: kind !== "query", answer };
    }
  }

  // convex-test names files by their digest and knows no origin; Convex names them by UUIDs under the deployment's.
  own(text) {
    for (const [uuid, { digest }] of this.files) text = text.replaceAll(`convex.cloud/api/storage/${digest}"`, `convex.cloud/api/storage/${uuid}"`);
    return text.replaceAll("https://some-deployment.convex.cloud", this.origin);
  }

  async store(bytes, type) {
    const storageId = await this.test.run((ctx) => ctx.storage.store(new Blob([bytes], { type })));
    this.files.set(randomUUID(), { bytes, type, digest: createHash("sha256").update(bytes).digest("base64") });
    return storageId;
  }

  async changed() {
    this.touch();
    await Promise.all([...this.sockets].map((socket) => socket.enqueue(() => socket.transition(false))));
  }
}

class Socket {
  constructor(deployment, ws, version) {
    Object.assign(this, { deployment, ws, chunks: version.localeCompare("1.28.0", undefined, { numeric: true }) >= 0 });
    this.session = null;
    this.caller = {};
    this.version = { querySet: 0, identity: 0, ts: ZERO };
    this.next = { querySet: 0, identity: 0 };
    this.queries = new Map();
    this.removed = [];
    this.work = Promise.resolve();
    deployment.sockets.add(this);
    ws.on("message", (data, binary) => this.enqueue(() => this.receive(data, binary)));
    ws.on("close", () => this.end());
    ws.on("error", () => this.end());
    this.ping = setInterval(() => this.send({ type: "Ping" }), PING_AFTER_MS);
  }

  end() {
    clearInterval(this.ping);
    this.deployment.sockets.delete(this);
  }

  // Frames of one socket in order; what they run may wait for others'.
  enqueue(step) {
    this.work = this.work.then(step).catch((error) => this.ws.close(1011, `InternalServerError: ${error.message}`.slice(0, 120)));
    return this.work;
  }

  send(message) {
    if (this.ws.readyState === 1) this.ws.send(JSON.stringify(message));
  }

  fatal(error) {
    this.send({ type: "FatalError", error });
    this.ws.close();
  }

  async receive(data, binary) {
    if (this.ws.readyState !== 1) return;
    if (binary) return this.ws.close(1003, "binary");
    const message = JSON.parse(data.toString());
    if (message.componentPath && !this.caller.admin) return this.fatal("componentPath is for administrators");
    if (!this.session && message.type !== "Connect") return this.fatal("Connect comes first");
    switch (message.type) {
      case "Connect": {
        if (this.session) return this.fatal("connected twice");
        this.session = message.sessionId;
        this.skew = Date.now() - message.clientTs;
        const seen = message.maxObservedTimestamp;
        if (seen && Buffer.from(seen, "base64").readBigUInt64LE() > this.deployment.ts) throw new Error("observed a timestamp of the future");
        return;
      }
      case "Authenticate": {
        if (message.baseVersion !== this.next.identity) return this.fatal(`BaseVersionMismatch: ${message.baseVersion}, not ${this.next.identity}`);
        const before = this.caller;
        try {
          if (message.tokenType === "None") this.caller = {};
          else if (message.tokenType === "User") this.caller = await this.deployment.verify(message.value);
          else if (message.tokenType === "Admin" && message.value === this.deployment.adminKey) this.caller = { admin: true, claims: message.impersonating };
          else throw new Error("bad admin key");
        } catch (error) {
          this.send({ type: "AuthError", error: error.message, baseVersion: message.baseVersion, authUpdateAttempted: true });
          return this.ws.close();
        }
        this.next.identity += 1;
        const same = JSON.stringify(before.claims) === JSON.stringify(this.caller.claims);
        return this.transition(true, !same);
      }
      case "ModifyQuerySet": {
        if (message.baseVersion !== this.next.querySet) return this.fatal(`BaseVersionMismatch: ${message.baseVersion}, not ${this.next.querySet}`);
        if (message.newVersion <= message.baseVersion) return this.fatal("newVersion does not grow");
        for (const it of message.modifications) {
          if (it.componentPath && !this.caller.admin) return this.fatal("componentPath is for administrators");
          if (it.type === "Add" && this.queries.has(it.queryId)) throw new Error(`query ${it.queryId} is there`);
          if (it.type === "Remove" && !this.queries.has(it.queryId)) throw new Error(`query ${it.queryId} is not there`);
          if (it.type === "Add") this.queries.set(it.queryId, { path: it.udfPath, args: it.args, last: null });
          else this.queries.delete(it.queryId) && this.removed.push(it.queryId);
        }
        this.next.querySet = message.newVersion;
        return this.transition(true);
      }
      case "Mutation": {
        const known = this.remembered().get(message.requestId);
        if (known) {
          this.send(known);
          return this.transition(true);
        }
        const { answer } = await this.deployment.call("mutation", message.udfPath, message.args, this.caller);
        this.deployment.touch();
        const response = this.response("MutationResponse", message.requestId, answer);
        response.ts = response.success ? this.deployment.encodedTs() : null;
        if (response.success) this.remembered().set(message.requestId, response);
        if (this.deployment.loseReply) {
          this.deployment.loseReply = false;
          this.ws.terminate();
        }
        this.send(response);
        await this.transition(true);
        this.deployment.changed();
        return;
      }
      case "Action":
        // Not awaited: actions of a socket run side by side.
        this.deployment.call("action", message.udfPath, message.args, this.caller).then(({ answer }) => {
          this.enqueue(async () => this.send(this.response("ActionResponse", message.requestId, answer)));
          this.enqueue(() => this.transition(true));
          this.deployment.changed();
        });
        return;
      case "Event":
        return;
      default:
        return this.fatal(`unknown message ${message.type}`);
    }
  }

  response(type, requestId, answer) {
    const success = answer.status === "success";
    const response = { type, requestId, success, result: success ? answer.value : answer.errorMessage, logLines: [] };
    if (answer.errorData !== undefined) response.errorData = answer.errorData;
    return response;
  }

  remembered() {
    const { committed } = this.deployment;
    if (!committed.has(this.session)) committed.set(this.session, new Map());
    if (committed.size > MUTATIONS_KEPT) committed.delete(committed.keys().next().value);
    return committed.get(this.session);
  }

  // Re-runs the subscribed queries and sends what changed; `always` also when nothing did.
  async transition(always, everything) {
    if (this.caller.exp && Date.now() / 1000 > this.caller.exp + 5) {
      this.send({ type: "AuthError", error: "token expired", baseVersion: this.version.identity - 1, authUpdateAttempted: false });
      return this.ws.close();
    }
    const ts = this.deployment.encodedTs();
    const modifications = this.removed.splice(0).map((queryId) => ({ type: "QueryRemoved", queryId }));
    for (const [queryId, query] of this.queries) {
      const { answer } = await this.deployment.call("query", query.path, query.args, this.caller);
      const text = JSON.stringify(answer);
      if (text === query.last && !everything) continue;
      query.last = text;
      const { status, value, errorMessage, errorData } = answer;
      const it = status === "success" ? { type: "QueryUpdated", queryId, value, logLines: [], journal: null } : { type: "QueryFailed", queryId, errorMessage, logLines: [], journal: null };
      if (errorData !== undefined) it.errorData = errorData;
      modifications.push(it);
    }
    const end = { ...this.next, ts };
    if (!always && modifications.length === 0) return;
    const message = { type: "Transition", startVersion: this.version, endVersion: end, modifications, clientClockSkew: this.skew, serverTs: Date.now() * 1e6 };
    this.version = end;
    const text = JSON.stringify(message);
    if (!this.chunks || text.length <= this.deployment.chunkBytes) return this.send(message);
    const parts = text.match(new RegExp(`[^]{1,${this.deployment.chunkBytes}}`, "gu"));
    const transitionId = randomUUID();
    for (const [partNumber, chunk] of parts.entries()) {
      this.send({ type: "TransitionChunk", chunk, partNumber, totalParts: parts.length, transitionId });
      await new Promise(setImmediate);
    }
  }
}

async function body(request) {
  const parts = [];
  for await (const part of request) parts.push(part);
  return Buffer.concat(parts);
}

async function identify(deployment, request, url) {
  const header = request.headers.authorization ?? (url.searchParams.has("adminKey") ? `Convex ${url.searchParams.get("adminKey")}` : "");
  const [scheme, value] = header.split(" ");
  if (scheme === "Convex") {
    const [key, identity] = value.split(/:(?=[A-Za-z0-9+/=]+$)/);
    if (key !== deployment.adminKey && value !== deployment.adminKey) throw new HttpError(401, "BadDeployKey", "The provided deploy key is invalid.");
    return { admin: true, claims: value === deployment.adminKey ? undefined : JSON.parse(Buffer.from(identity, "base64")) };
  }
  if (scheme !== "Bearer") return {};
  return deployment.verify(value).catch((error) => {
    throw new HttpError(401, "Unauthenticated", `Could not verify the token: ${error.message}`);
  });
}

async function answer(deployment, request) {
  const url = new URL(request.url, "http://double");
  const path = url.pathname;
  const json = async () => JSON.parse((await body(request)).toString() || "{}");
  if (path === "/" || path === "/version" || path === "/instance_version") return new Response("convex-double");
  if (path === "/instance_name") return new Response(deployment.name);
  if (path.startsWith("/http/")) {
    const caller = await identify(deployment, request, url).catch(() => ({}));
    const init = { method: request.method, headers: request.headers, body: ["GET", "HEAD"].includes(request.method) ? undefined : await body(request) };
    const as = caller.claims ? deployment.test.withIdentity(caller.claims) : deployment.test;
    const response = await as.fetch(path.slice(5) + url.search, init);
    deployment.changed();
    return response;
  }
  if (path === "/api/storage/upload") {
    if (!url.searchParams.get("token")) throw new HttpError(401, "BadUploadToken", "no upload token");
    return Response.json({ storageId: await deployment.store(await body(request), request.headers["content-type"]) });
  }
  if (path.startsWith("/api/storage/")) {
    const file = deployment.files.get(path.slice(13));
    if (!file) throw new HttpError(404, "FileNotFound", "File not found");
    return new Response(file.bytes, { headers: { "content-type": file.type ?? "application/octet-stream", "cache-control": "private, max-age=2592000" } });
  }
  const caller = await identify(deployment, request, url);
  const run = async (kind, { path, args }) => {
    const { wrote, answer } = await deployment.call(kind, path, args, caller);
    if (wrote) await deployment.changed();
    return answer;
  };
  const kind = /^\/api\/(query|mutation|action)$/.exec(path)?.[1];
  if (kind === "query" && request.method === "GET") {
    return Response.json(await run(kind, { path: url.searchParams.get("path"), args: JSON.parse(url.searchParams.get("args") ?? "{}") }));
  }
  if (kind) return Response.json(await run(kind, await json()));
  if (path === "/api/query_ts") return Response.json({ ts: deployment.encodedTs() });
  if (path === "/api/query_at_ts") return Response.json(await run("query", await json()));
  if (path === "/api/query_batch") {
    const { queries } = await json();
    return Response.json({ results: await Promise.all(queries.map((it) => run("query", it))) });
  }
  if (path.startsWith("/api/run/")) {
    const parts = path.slice(9).split("/");
    const name = parts.pop();
    return Response.json(await run(null, { path: `${parts.join("/")}:${name}`, args: (await json()).args }));
  }
  if (!caller.admin) throw new HttpError(403, "BadDeployKey", "This needs a deploy key.");
  if (path === "/api/function") return Response.json(await run(null, await json()));
  if (path === "/api/list_snapshot") {
    const all = await deployment.test.run((ctx) => ctx.db.query("messages").collect());
    return Response.json({ snapshot: Number(deployment.ts), cursor: null, hasMore: false, values: all.map((it) => ({ _table: "messages", _ts: 0, ...it })) });
  }
  if (path === "/double/drop") for (const socket of deployment.sockets) socket.ws.terminate();
  else if (path === "/double/lose-reply") deployment.loseReply = true;
  else throw new HttpError(404, "NotFound", `no ${path}`);
  return Response.json({});
}

function serve(deployment) {
  const server = createServer(async (request, response) => {
    const cors = { "access-control-allow-origin": request.headers.origin ?? "*", "access-control-allow-credentials": "true", vary: "origin" };
    if (request.method === "OPTIONS" && !request.url.startsWith("/http/")) {
      return response.writeHead(204, { ...cors, "access-control-allow-methods": "GET,POST,OPTIONS,PATCH,DELETE,PUT", "access-control-allow-headers": request.headers["access-control-request-headers"] ?? "*", "access-control-max-age": "86400" }).end();
    }
    try {
      const reply = await answer(deployment, request);
      response.writeHead(reply.status, { ...Object.fromEntries(reply.headers), ...(request.url.startsWith("/http/") ? {} : cors) });
      response.end(Buffer.from(await reply.arrayBuffer()));
    } catch (error) {
      const { status = 400, code = "BadRequest", message } = error;
      response.writeHead(status, { ...cors, "content-type": "application/json" }).end(JSON.stringify({ code, message }));
    }
  });
  const sockets = new WebSocketServer({ noServer: true, maxPayload: 64 << 20 });
  server.on("upgrade", (request, socket, head) => {
    const version = /^\/api(?:\/(\d+\.\d+\.\d+))?\/sync$/.exec(request.url.split("?")[0]);
    if (!version) return socket.end("HTTP/1.1 404 Not Found\r\n\r\n");
    sockets.handleUpgrade(request, socket, head, (ws) => new Socket(deployment, ws, version[1] ?? "0.0.0"));
  });
  // Its port was free a moment ago; an outgoing connection may hold it for another.
  const until = Date.now() + LISTEN_WITHIN_MS;
  const listen = () => server.listen(deployment.port, "127.0.0.1");
  server.on("error", (error) => {
    if (error.code !== "EADDRINUSE" || Date.now() > until) throw error;
    setTimeout(listen, 100);
  });
  listen();
}

for (const config of JSON.parse(readFileSync(process.argv[2], "utf8")).deployments) serve(new Deployment(config));
