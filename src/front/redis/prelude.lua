local redis,_G,loadstring,load@NAME@=(function(R,G,rawloadstring,rawload)
local P,C='@P@','@C@'
local up,find,sub,byte=string.upper,string.find,string.sub,string.byte
local n,L=#P,ARGV[#ARGV]
ARGV[#ARGV]=nil
local cap,ttl=string.match(L,'^(%d+) (%d+)$')
cap,ttl=tonumber(cap),tonumber(ttl)
local made=0
for i=1,#KEYS do KEYS[i]=sub(KEYS[i],n+1) end
local S='@S@'
local function own(v) if type(v)=='string' and sub(v,1,n)==P then return sub(v,n+1) end return v end
local function put(a,i,j,s) for x=i,j,s or 1 do local v=a[x] if type(v)=='string' or type(v)=='number' then a[x]=P..v end end end
local function word(a,i) return type(a[i])=='string' and up(a[i]) or '' end
local function run(raise,...)
 local a,z={...},select('#',...)
 local f=raise and R.call or R.pcall
 local c=word(a,1)
 if c=='GET' or c=='HGET' or c=='HGETALL' then put(a,2,2) return f(unpack(a,1,z)) end
 local _,e=find(S,' '..c..':',1,true)
 if not e then put(a,2,2) return f(unpack(a,1,z)) end
 local k,m=byte(S,e+1,e+2)
 local store
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
 elseif k==112 then if a[2] then a[2]=C..a[2] end
 elseif k==103 then put(a,2,2)
 elseif k==115 then for i=2,z do if word(a,i)=='STREAMS' and not (word(a,2)=='GROUP' and i<5) then put(a,i+1,i+math.ceil((z-i)/2)) break end end
 elseif k==114 then put(a,2,2) for i=5,z-1 do local w=word(a,i) if w=='STORE' or w=='STOREDIST' then put(a,i+1,i+1) store=i+1 end end
 elseif k==116 then put(a,2,2) local i=3 while i<=z do local w=word(a,i) if w=='STORE' or w=='BY' or w=='GET' then put(a,i+1,i+1) if w=='STORE' then store=i+1 end i=i+1 elseif w=='LIMIT' then i=i+2 end i=i+1 end
 elseif k==104 then local seen for i=3,z-1 do if word(a,i)=='MATCH' then put(a,i+1,i+1) seen=true end end if not seen then a[z+1]='MATCH' a[z+2]=P..'*' z=z+2 end
 end
 local d1,d2,ds=0,-1,1
 if m==70 then d1,d2=(k==102 or k==99) and 3 or 2,(k==102 or k==99) and 3 or 2
 elseif m==76 then d1,d2=3,3
 elseif m==69 then d1,d2,ds=2,z,2
 elseif m==83 and store then d1,d2=store,store
 elseif m==84 then d1,d2=2,2 end
 local new=0
 if cap>0 and d2>0 and m~=84 then
  for x=d1,d2,ds do if a[x] and R.call('EXISTS',a[x])==0 then new=new+1 end end
  if new>0 and @HELD@+new>cap then
   local o={err='@OOM@'}
   if raise then error(o) end
   return o
  end
 end
 local r=f(unpack(a,1,z))
 if type(r)~='table' or not r.err then made=made+new end
 if ttl>0 and d2>0 then for x=d1,d2,ds do if a[x] then R.call('EXPIRE',a[x],ttl,'LT') end end end
 if type(r)=='table' then
  if k==103 then for i=1,#r do r[i]=own(r[i]) end
  elseif k==104 and type(r[2])=='table' then for i=1,#r[2] do r[2][i]=own(r[2][i]) end
  elseif k==108 or ((k==110 or k==109) and find(c,'MPOP',1,true)) then r[1]=own(r[1])
  elseif k==115 then for i=1,#r do if type(r[i])=='table' then r[i][1]=own(r[i][1]) end end end
 elseif k==121 then r=own(r) end
 return r
end
local W=setmetatable({call=function(...) return run(true,...) end,pcall=function(...) return run(false,...) end},{__index=R,__metatable=false})
local E=setmetatable({redis=W},{__index=G,__metatable=false})
local function loader(s,name)
 if type(s)~='string' or byte(s)==27 then return nil,'only text can be loaded' end
 local f,e=rawloadstring(s,name)
 if not f then return f,e end
 f,e=rawloadstring('return function(redis,_G,loadstring,load) return function(...) '..s..'\nend end',name)
 if not f then return f,e end
 return f()(W,E,E.loadstring,E.load)
end
E.loadstring,E.load=loader,loader
E._G=E
return W,E,loader,loader@MADE@
end)(redis,_G,loadstring,load)
