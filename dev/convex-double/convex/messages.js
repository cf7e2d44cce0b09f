// The chat of `make dev`: real Convex functions. The verified token says who is asking, in HTTP actions too. On a deployment
// that several organisations share, dynabase also writes `orgId` into the arguments of queries, mutations and actions.
import { actionGeneric as action, internalMutationGeneric as internalMutation, mutationGeneric as mutation, queryGeneric as query, makeFunctionReference } from "convex/server";
import { ConvexError, v } from "convex/values";

const orgId = v.optional(v.string());

async function caller(ctx) {
  const identity = await ctx.auth.getUserIdentity();
  const org = identity?.org_id;
  if (!org) throw new ConvexError({ code: "unauthenticated", message: "sign in first" });
  return { org, author: identity.subject };
}

export const list = query({
  args: { channel: v.string(), orgId },
  handler: async (ctx, args) => {
    const { org } = await caller(ctx);
    const all = await ctx.db.query("messages").collect();
    return all.filter((it) => it.org === org && it.channel === args.channel).map(({ author, body }) => ({ author, body }));
  },
});

export const send = mutation({
  args: { channel: v.string(), body: v.string(), orgId },
  handler: async (ctx, args) => {
    const { org, author } = await caller(ctx);
    return await ctx.db.insert("messages", { org, author, channel: args.channel, body: args.body });
  },
});

export const sendFromAction = action({
  args: { channel: v.string(), body: v.string(), orgId },
  handler: async (ctx, args) => ctx.runMutation(makeFunctionReference("messages:send"), args),
});

export const whoami = query({
  args: { orgId },
  handler: async (ctx, args) => ({ ...(await ctx.auth.getUserIdentity()), argument: args.orgId ?? null }),
});

export const big = query({
  args: { channel: v.string(), bytes: v.number(), orgId },
  handler: async (ctx, args) => {
    const { org } = await caller(ctx);
    const all = await ctx.db.query("messages").collect();
    return { count: all.filter((it) => it.org === org && it.channel === args.channel).length, filling: "x".repeat(args.bytes) };
  },
});

export const refuse = mutation({
  args: { orgId },
  handler: async () => {
    throw new ConvexError({ code: "app_says_no", detail: [1, 2] });
  },
});

export const slow = action({
  args: { ms: v.number(), orgId },
  handler: async (_ctx, args) => {
    await new Promise((resolve) => setTimeout(resolve, args.ms));
    return args.ms;
  },
});

export const uploadUrl = mutation({ args: { orgId }, handler: async (ctx) => await ctx.storage.generateUploadUrl() });

export const fileUrl = query({ args: { id: v.string(), orgId }, handler: async (ctx, args) => await ctx.storage.getUrl(args.id) });

export const purge = internalMutation({
  args: {},
  handler: async (ctx) => {
    const all = await ctx.db.query("messages").collect();
    for (const it of all) await ctx.db.delete(it._id);
    return all.length;
  },
});
