// HTTP actions of the chat.
import { httpActionGeneric as httpAction, httpRouter, makeFunctionReference } from "convex/server";

const http = httpRouter();

http.route({
  path: "/hello",
  method: "GET",
  handler: httpAction(async (ctx, request) => {
    const identity = await ctx.auth.getUserIdentity();
    return Response.json({ hello: identity?.subject ?? "anonymous", address: request.headers.get("x-forwarded-for") });
  }),
});

http.route({
  path: "/messages",
  method: "POST",
  handler: httpAction(async (ctx, request) => {
    const id = await ctx.runMutation(makeFunctionReference("messages:send"), await request.json());
    return Response.json({ id });
  }),
});

export default http;
