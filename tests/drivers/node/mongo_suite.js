// The Node driver and mongoose before the proxy, as tenants of both isolations.
'use strict';

const fs = require('node:fs');
const assert = require('node:assert/strict');
const { MongoClient, GridFSBucket, ObjectId } = require('mongodb');
const mongoose = require('mongoose');

const ready = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'));
const only = process.argv.slice(3);
const tenant = (org) => ready.tenants.find((t) => t.org_id === org);
const options = { serverSelectionTimeoutMS: 20000 };

async function withDriver(url) {
  const client = new MongoClient(url, options);
  try {
    const db = client.db();
    assert.equal(db.databaseName, 'app');
    const c = db.collection('node');
    await c.deleteMany({});
    await c.insertMany(Array.from({ length: 120 }, (_, i) => ({ _id: i, n: i % 5 })));
    assert.equal(await c.countDocuments({ n: 1 }), 24);
    assert.equal((await c.find({}, { batchSize: 20 }).toArray()).length, 120);
    assert.deepEqual(await c.aggregate([{ $group: { _id: '$n', k: { $sum: 1 } } }, { $sort: { _id: 1 } }, { $limit: 1 }]).toArray(), [{ _id: 0, k: 24 }]);
    await assert.rejects(c.insertOne({ _id: 1 }), (error) => error.code === 11000 && !/t_|shared_/.test(error.message));
    const session = client.startSession();
    await session.withTransaction(async () => {
      await c.insertOne({ _id: 1000 }, { session });
      await c.updateOne({ _id: 1 }, { $set: { x: 1 } }, { session });
    });
    await session.endSession();
    assert.deepEqual(await c.findOne({ _id: 1 }), { _id: 1, n: 1, x: 1 });
    const stream = c.watch([], { maxAwaitTimeMS: 500 });
    const next = stream.next();
    let written = false;
    // The stream exists once its first request was answered, which the driver does not tell.
    const writing = (async () => {
      for (let i = 2000; !written && i < 2040; i += 1) {
        await c.insertOne({ _id: i });
        await new Promise((resolve) => setTimeout(resolve, 250));
      }
    })();
    const event = await next;
    written = true;
    await writing;
    assert.equal(event.operationType, 'insert');
    assert.deepEqual(event.ns, { db: 'app', coll: 'node' });
    assert.ok(!('org_id' in event.fullDocument));
    await stream.close();
    const bucket = new GridFSBucket(db);
    const id = new ObjectId();
    await new Promise((resolve, reject) => {
      const upload = bucket.openUploadStreamWithId(id, 'f');
      upload.on('finish', resolve).on('error', reject);
      upload.end(Buffer.alloc(300000, 7));
    });
    let size = 0;
    for await (const chunk of bucket.openDownloadStream(id)) size += chunk.length;
    assert.equal(size, 300000);
    await bucket.delete(id);
    await c.deleteMany({});
  } finally {
    await client.close();
  }
}

async function withMongoose(url) {
  const connection = await mongoose.createConnection(url, options).asPromise();
  try {
    const schema = new mongoose.Schema({ name: { type: String, required: true, unique: true }, tags: [String], owner: { type: mongoose.Schema.Types.ObjectId, ref: 'Person' } }, { timestamps: true });
    const Person = connection.model('Person', schema);
    await Person.deleteMany({});
    await Person.init();
    const ada = await Person.create({ name: 'Ada', tags: ['a'] });
    await Person.create({ name: 'Bob', owner: ada._id });
    const bob = await Person.findOne({ name: 'Bob' }).populate('owner');
    assert.equal(bob.owner.name, 'Ada');
    ada.tags.push('b');
    await ada.save();
    assert.deepEqual((await Person.findById(ada._id).lean()).tags, ['a', 'b']);
    assert.ok(!('org_id' in (await Person.findById(ada._id).lean())));
    await assert.rejects(Person.create({ name: 'Ada' }), (error) => error.code === 11000);
    await connection.transaction(async (session) => {
      await Person.create([{ name: 'Cyd' }], { session });
    });
    assert.equal(await Person.countDocuments(), 3);
    await Person.deleteMany({});
  } finally {
    await connection.close();
  }
}

async function withOidc() {
  const { token, urls } = tenant('initech');
  const address = urls.mongodb.split('@')[1].split('/')[0];
  let asked = 0;
  const client = new MongoClient(`mongodb://${address}/?directConnection=true`, {
    ...options,
    authMechanism: 'MONGODB-OIDC',
    authMechanismProperties: { OIDC_CALLBACK: async () => ({ accessToken: (asked += 1, token), expiresInSeconds: 3600 }) },
  });
  try {
    await Promise.all(Array.from({ length: 10 }, () => client.db('app').collection('oidc').countDocuments({})));
    assert.equal(asked, 1);
  } finally {
    await client.close();
  }
}

// With a set's name, with directConnection, with neither, behind a balancer; and with a name that is not ours.
async function withSet(org) {
  const bare = tenant(org).urls.mongodb.split('/app?')[0];
  const string = (...more) => `${bare}/app?${['authMechanism=PLAIN', ...more].join('&')}`;
  for (const [more, sees] of [
    [['replicaSet=rs0'], 'ReplicaSetWithPrimary'],
    [['replicaSet=rs0', 'directConnection=true'], 'Single'],
    [['directConnection=true'], 'Single'],
    [[], 'ReplicaSetWithPrimary'],
    [['loadBalanced=true'], 'LoadBalanced'],
  ]) {
    const client = new MongoClient(string(...more), options);
    let seen;
    client.on('topologyDescriptionChanged', (event) => { seen = event.newDescription.type; });
    try {
      const c = client.db().collection('forms');
      await c.deleteMany({});
      await client.withSession((session) => session.withTransaction(() => c.insertOne({ n: 1 }, { session })));
      assert.equal(await c.countDocuments({}), 1);
      await c.deleteMany({});
      assert.equal(seen, sees, more.join('&'));
    } finally {
      await client.close();
    }
  }
  const quick = { serverSelectionTimeoutMS: 1500 };
  for (const more of [['replicaSet=other'], ['replicaSet=other', 'directConnection=true']]) {
    const client = new MongoClient(string(...more), quick);
    try {
      await assert.rejects(client.db().collection('forms').findOne({}), (error) => error.name === 'MongoServerSelectionError');
    } finally {
      await client.close();
    }
  }
  const connection = await mongoose.createConnection(string('replicaSet=rs0'), options).asPromise();
  try {
    const Form = connection.model('Form', new mongoose.Schema({ n: Number }));
    await Form.deleteMany({});
    await Form.create({ n: 2 });
    assert.equal((await Form.findOne({})).n, 2);
    await Form.deleteMany({});
  } finally {
    await connection.close();
  }
}

const cases = {
  a_replica_set_as_a_filter_tenant: () => withSet('globex'),
  a_replica_set_as_a_database_tenant: () => withSet('umbrella'),
  the_driver_as_a_filter_tenant: () => withDriver(tenant('globex').urls.mongodb),
  the_driver_as_a_database_tenant: () => withDriver(tenant('initech').urls.mongodb),
  the_driver_compressed: () => withDriver(`${tenant('initech').urls.mongodb}&compressors=zlib`),
  mongoose_as_a_filter_tenant: () => withMongoose(tenant('globex').urls.mongodb),
  mongoose_as_a_database_tenant: () => withMongoose(tenant('initech').urls.mongodb),
  oidc: withOidc,
};

(async () => {
  let failed = 0;
  for (const [name, run] of Object.entries(cases)) {
    if (only.length && !only.includes(name)) continue;
    try {
      await run();
      console.log(`PASS ${name}`);
    } catch (error) {
      failed += 1;
      console.log(`FAIL ${name}: ${String(error.stack).replace(/\s+/g, ' ').slice(0, 400)}`);
    }
  }
  process.exit(failed ? 1 : 0);
})();
