function(KEYS,ARGV,P)
local limits=ARGV[#ARGV]
ARGV[#ARGV]=nil
local made,ticks,real,tools,cap,ttl,left=0,0,''
for i=1,#KEYS do KEYS[i]=string.sub(KEYS[i],#P+1) end
@TICK@
local function make()
 local t={}
 cap,ttl,left=string.match(limits,'^(%d+) (%d+) (%d+)')
 cap,ttl,left=tonumber(cap),tonumber(ttl),tonumber(left)
 function t.refuse(raise,text) local o={err=text} if raise then error(o) end return o end
 function t.own(v) if type(v)=='string' and string.sub(v,1,#P)==P then return string.sub(v,#P+1) end return v end
 function t.put(a,i,j,s) for x=i,j,s or 1 do local v=a[x] if type(v)=='string' or type(v)=='number' then a[x]=P..v end end end
 function t.word(a,i)
  local v=a[i]
  if type(v)~='string' then return '' end
  local z=string.find(v,'\0',1,true)
  if z then v=string.sub(v,1,z-1) end
  return string.upper(v)
 end
 local function size(v) v=tonumber(v) if v and v>0 then return v end return 0 end
 function t.weight(a,z,c)
  if c=='SETRANGE' then return size(a[3]) end
  if c=='SETBIT' then return size(a[3])/8 end
  if c~='BITFIELD' then return 12288 end
  local most=0
  for i=3,z-1 do
   local k,o=a[i],a[i+1]
   if type(k)=='string' and type(o)~='nil' then
    local bits=string.match(k,'^[iu](%d+)$')
    if bits then
     o=tostring(o)
     local b=string.byte(o)==35 and size(string.sub(o,2))*size(bits) or size(o)
     if b>most then most=b end
    end
   end
  end
  return most/8
 end
 function t.held(a,d1,d2,ds)
  local h=0
  for x=d1,d2,ds do
   if a[x] then local u=redis.pcall('MEMORY','USAGE',a[x],'SAMPLES',0) if type(u)=='number' then h=h+u end end
  end
  return h
 end
 tools=t
 return t
end
local function run(raise,...)
 local S='@S@'
 local a,z={...},select('#',...)
 ticks=ticks+@CALL@
 if ticks>@TICKS@ then error({err='@STOP@'}) end
 local c=type(a[1])=='string' and string.upper(a[1]) or ''
 local e
 if c~='GET' and c~='HGET' and c~='HGETALL' then
  local _
  _,e=string.find(S,' '..c..':',1,true)
 end
 if not e then
  local v=a[2]
  if type(v)=='string' or type(v)=='number' then a[2]=P..v end
  return (raise and redis.call or redis.pcall)(unpack(a,1,z))
 end
 local k,m,g=string.byte(S,e+1,e+3)
 local t=tools or make()
 if g~=45 then
  local w=0
  for i=2,z do local v=a[i] if type(v)=='string' then w=w+#v end end
  if g==42 then w=w+t.weight(a,z,c) end
  if w>left then return t.refuse(raise,'@OOMMEMORY@') end
  left=left-w
 end
 local store
 local put=t.put
 if k==107 then put(a,2,2)
 elseif k==97 then put(a,2,z)
 elseif k==98 then put(a,2,3)
 elseif k==101 then put(a,2,z,2)
 elseif k==108 then put(a,2,z-1)
 elseif k==102 then put(a,3,z)
 elseif k==99 then put(a,3,3)
 elseif k==110 then put(a,3,2+(tonumber(a[2]) or z))
 elseif k==109 then put(a,4,3+(tonumber(a[3]) or z))
 elseif k==100 then put(a,2,2) put(a,4,3+(tonumber(a[3]) or z))
 elseif k==112 then if a[2] then a[2]='@C@'..a[2] end
 elseif k==103 then put(a,2,2)
 elseif k==115 then for i=2,z do if t.word(a,i)=='STREAMS' and not (t.word(a,2)=='GROUP' and i<5) then put(a,i+1,i+math.ceil((z-i)/2)) break end end
 elseif k==114 then put(a,2,2) for i=5,z-1 do local w=t.word(a,i) if w=='STORE' or w=='STOREDIST' then put(a,i+1,i+1) store=i+1 end end
 elseif k==116 then put(a,2,2) local i=3 while i<=z do local w=t.word(a,i) if w=='STORE' or w=='BY' or w=='GET' then put(a,i+1,i+1) if w=='STORE' then store=i+1 end i=i+1 elseif w=='LIMIT' then i=i+2 end i=i+1 end
 elseif k==104 then local seen for i=3,z-1 do if t.word(a,i)=='MATCH' then put(a,i+1,i+1) seen=true end end if not seen then a[z+1]='MATCH' a[z+2]=P..'*' z=z+2 end
 end
 local d1,d2,ds=0,-1,1
 if m==70 then d1,d2=(k==102 or k==99) and 3 or 2,(k==102 or k==99) and 3 or 2
 elseif m==76 then d1,d2=3,3
 elseif m==69 then d1,d2,ds=2,z,2
 elseif m==83 and store then d1,d2=store,store
 elseif m==84 then d1,d2=2,2 end
 local new=0
 if cap>0 and d2>0 and m~=84 then
  for x=d1,d2,ds do if a[x] and redis.call('EXISTS',a[x])==0 then new=new+1 end end
  if new>0 and @HELD@+new>cap then return t.refuse(raise,'@OOM@') end
 end
 local derived=g~=45 and d2>0 and (m==83 or c=='RESTORE' or (m==70 and k~=107 and k~=99))
 local before=derived and t.held(a,d1,d2,ds)
 local r=redis.pcall(unpack(a,1,z))
 if type(r)=='table' and r.err then
  local w=string.match(r.err,'^%u+')
  if w and not string.find(real,' '..w..' ',1,true) then real=real..' '..w..' ' end
  if raise then error(r) end
 else made=made+new end
 if derived then left=left+before-t.held(a,d1,d2,ds) end
 if ttl>0 and d2>0 then for x=d1,d2,ds do if a[x] then redis.call('EXPIRE',a[x],ttl,'LT') end end end
 local own=t.own
 if type(r)=='table' then
  if k==103 then for i=1,#r do r[i]=own(r[i]) end
  elseif k==104 and type(r[2])=='table' then for i=1,#r[2] do r[2][i]=own(r[2][i]) end
  elseif k==108 or ((k==110 or k==109) and string.find(c,'MPOP',1,true)) then r[1]=own(r[1])
  elseif k==115 then for i=1,#r do if type(r[i])=='table' then r[i][1]=own(r[i][1]) end end end
 elseif k==121 then r=own(r) end
 return r
end
local W=setmetatable({call=function(...) return run(true,...) end,pcall=function(...) return run(false,...) end},{__index=function(_,k)
 if k=='call' or k=='pcall' then return nil end
 if k=='log' or k=='set_repl' or k=='breakpoint' or k=='debug' then return function() return false end end
 return redis[k]
end,__metatable=false})
@ENV@
local function finish(f)
 local function same(v) return v end
 local ok,r=xpcall(f,same)
 if ticks>@TICKS@ then error({err='@STOP@'}) end
 if ok and type(r)~='table' then @RETURN@ end
 local items,bytes=@ITEMS@,@BYTES@
 local function honest(text)
  local w=string.match(text,'^%u+')
  if w and string.find(' MOVED ASK READONLY CLUSTERDOWN MASTERDOWN LOADING NOSCRIPT ',' '..w..' ',1,true) and not string.find(real,' '..w..' ',1,true) then return 'ERR '..text end
  return text
 end
 local function clean(v,depth)
  if type(v)=='string' then bytes=bytes-#v end
  if items<0 or bytes<0 then error({err='@LARGE@'}) end
  if type(v)~='table' then return v end
  if depth>@DEPTH@ then error({err='ERR reached lua stack limit'}) end
  if getmetatable(v)~=nil then local o={} for k,w in next,v do o[k]=w end v=o end
  for k,w in next,v do
   items=items-1
   local t=type(k)
   if t=='string' then bytes=bytes-#k
   elseif t=='table' and not rawequal(clean(k,depth+1),k) then error({err='ERR a key of a reply has a metatable'}) end
   t=type(w)
   if t=='string' then bytes=bytes-#w
   elseif t=='table' then
    local x=clean(w,depth+1)
    if not rawequal(x,w) then v[k]=x end
   end
  end
  if items<0 or bytes<0 then error({err='@LARGE@'}) end
  return v
 end
 if ok then ok,r=xpcall(function() return clean(r,0) end,same) end
 local t=type(r)
 if ok then
  if t=='table' then local e=rawget(r,'err') if type(e)=='string' then r.err=honest(e) end end
  @RETURN@
 end
 if t=='table' then
  local e=rawget(r,'err')
  error({err=type(e)=='string' and honest(e) or 'ERR @NOTEXT@',ignore_error_stats_update=rawget(r,'ignore_error_stats_update')==true or nil})
 end
 if t=='string' or t=='number' or t=='boolean' or t=='nil' then error(r,0) end
 error('@NOTEXT@',0)
end
return W,finish@GIVEN@
end
