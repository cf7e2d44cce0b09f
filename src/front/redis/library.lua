local dynabase_end=(function(api)
local prelude=@PRELUDE@
local function call(main,name,keys,args)
 local P=args[#args]
 args[#args]=nil
 local W,finish,tick,env=prelude(keys,args,P)
 return finish(function()
  local found={}
  W.register_function=function(...)
   local a,b=...
   if b==nil and type(a)=='table' then a,b=a.function_name,a.callback end
   found[a..'']=b
  end
  main(W,tick@ENV@)
  W.register_function=nil
  return found[name](keys,args)
 end)
end
return function(main)
 local count,ticks=0,0
 local function tick()
  ticks=ticks+1
  if ticks>@TICKS@ then local dynabase_ticks dynabase_ticks() end
 end
 local function register(...)
  local a,b,c=...
  if c~=nil or a==nil or a==true or a==false then return api.register_function(...) end
  local name,callback,description,flags=a,b,nil,nil
  if b==nil then
   name,callback,description,flags=a.function_name,a.callback,a.description,a.flags
   if name==nil then return api.register_function({}) end
  end
  name=name..''
  if name=='' then return api.register_function(name,tick) end
  if callback==nil or callback==true or callback==false then return api.register_function({function_name='@M@'..name,callback=callback}) end
  count=count+1
  if count>@FUNCTIONS@ then local dynabase_count dynabase_count() end
  if description~=nil then description=description..'' end
  if #name>@NAME@ or description~=nil and #description>@DESCRIPTION@ then local dynabase_length dynabase_length() end
  local function f(keys,args) return call(main,name,keys,args) end
  if b~=nil then return api.register_function('@M@'..name,f) end
  return api.register_function({function_name='@M@'..name,callback=f,description=description,flags=flags})
 end
 main({register_function=register,log=function() end,LOG_DEBUG=0,LOG_VERBOSE=1,LOG_NOTICE=2,LOG_WARNING=3,REDIS_VERSION=api.REDIS_VERSION,REDIS_VERSION_NUM=api.REDIS_VERSION_NUM},tick)
end
end)(redis)
