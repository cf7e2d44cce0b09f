// Organisations of one case alone, on the shared deployment, so that cases don't use up each other's limits; and what
// an operator does to them by hand.
'use strict';

const fs = require('node:fs');
const path = require('node:path');
const crypto = require('node:crypto');
const { MongoClient } = require('mongodb');

// Whoever has a token here, unless a case says who.
const USER = '8dc8a8bb-13ec-48d9-a321-785d7178358a';

// For what the ready file says; `prefix` tells this suite's organisations from others'.
function organisations(readyFile, prefix) {
  const ready = JSON.parse(fs.readFileSync(readyFile, 'utf8'));
  // Where tests/drivers/run lets `dynabase dev` live: beside the ready file.
  const toml = () => fs.readFileSync(path.join(path.dirname(readyFile), 'data/dynabase.toml'), 'utf8');

  // A token of the development issuer.
  function token(org, { seconds = 3600, subject = USER } = {}) {
    const [, secret] = /^hs256_secret = "(.*)"$/m.exec(toml());
    const [, issuer] = /^issuer = "(.*)"$/m.exec(toml());
    const now = Math.floor(Date.now() / 1000);
    const claims = { iss: issuer, aud: 'authenticated', sub: subject, session_id: USER, role: 'authenticated', email: `${subject}@${org}.example`, iat: now, exp: now + seconds, org_id: org };
    const part = (value) => Buffer.from(JSON.stringify(value)).toString('base64url');
    const signed = `${part({ alg: 'HS256', typ: 'JWT' })}.${part(claims)}`;
    return `${signed}.${crypto.createHmac('sha256', secret).update(signed).digest('base64url')}`;
  }

  // The record is replaced, straight on the catalog.
  async function write(record) {
    const client = await MongoClient.connect(ready.catalog.url);
    await client.db(ready.catalog.database).collection('orgs').replaceOne({ _id: record._id }, record, { upsert: true });
    await client.close();
  }

  // A new one, once `known` says that it can be used.
  let made = 0;
  async function organisation(known, tier = 'FREE') {
    const org = `${prefix}${process.pid}n${(made += 1)}`;
    await write({ _id: org, tier, status: 'active', epoch: 1 });
    const deadline = Date.now() + 15_000;
    while (!(await known(token(org)))) {
      if (Date.now() > deadline) throw new Error(`${org} does not become known`);
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    return org;
  }

  return { token, write, organisation };
}

module.exports = { organisations, USER };
