// convex-test finds the functions' folder by this file.
import { anyApi } from "convex/server";

export const api = anyApi;
export const internal = anyApi;
