redis.setresp(tonumber(ARGV[3]))
local room,ttl=tonumber(ARGV[1]),tonumber(ARGV[2])
local held=redis.call('EXISTS',unpack(KEYS))
if #KEYS-held>room then return {0,redis.error_reply('@OOM@')} end
local reply=redis.pcall(unpack(ARGV,4))
if reply==nil then reply=false end
local made=redis.call('EXISTS',unpack(KEYS))-held
if ttl>0 and not (type(reply)=='table' and reply.err) then for i=1,#KEYS do redis.call('EXPIRE',KEYS[i],ttl,'LT') end end
return {made,reply}
