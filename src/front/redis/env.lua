local function env()
 local loader
 local raw=cjson
 local json=setmetatable({},{__index=function(j,k)
  local v=raw[k]
  if type(v)~='function' or k=='encode' or k=='decode' or k=='new' then return v end
  raw=raw.new()
  for name,value in next,raw do if rawget(j,name)==nil then rawset(j,name,value) end end
  return rawget(j,k)
 end,__metatable=false})
 local function meta(v) if type(v)=='table' then return getmetatable(v) end return nil end
 local function collect(o) if o=='count' then return collectgarbage(o) end return 0 end
 local E=setmetatable({redis=W,getmetatable=meta,cjson=json,collectgarbage=collect},{__index=function(_,k)
  if type(k)=='string' and string.find(' @HIDDEN@ ',' '..k..' ',1,true) then return nil end
  return _G[k]
 end,__metatable=false})
 function loader(s,name)
  if type(s)~='string' or string.byte(s)==27 then return nil,'only text can be loaded' end
  for w in string.gmatch('while repeat for function','%a+') do if string.find(s,'%f[%w_]'..w..'%f[^%w_]') then return nil,'no loop and no function can be loaded' end end
  local f,e=loadstring(s,name)
  if not f then return f,e end
  f,e=loadstring('return function(redis,@NAMES@) return function(...) '..s..'\nend end',name)
  if not f then return f,e end
  f=f()(W,E,E.loadstring,E.load,collect,meta,json)
  return function(...) tick() return f(...) end
 end
 E.loadstring,E.load,E._G=loader,loader,E
 return E,loader,loader,collect,meta,json
end
