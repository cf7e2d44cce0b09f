redis.setresp(tonumber(ARGV[3]))
local cap,ttl=tonumber(ARGV[1]),tonumber(ARGV[2])
local new=#KEYS-redis.call('EXISTS',unpack(KEYS))
if new>0 and redis.call('DBSIZE')+new>cap then return redis.error_reply('@OOM@') end
local reply=redis.pcall(unpack(ARGV,4))
if ttl>0 and not (type(reply)=='table' and reply.err) then for i=1,#KEYS do redis.call('EXPIRE',KEYS[i],ttl,'LT') end end
return reply
