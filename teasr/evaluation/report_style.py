"""Style and script of the report's page: light and dark, from 400 px of width on."""

STYLE = """
:root{color-scheme:light dark;--line:light-dark(#ddd,#444);--soft:light-dark(#5c5c5c,#a8a8a8);\
--page:light-dark(#fff,#16181c)}
body{font:15px/1.5 system-ui,sans-serif;max-width:1280px;margin:2rem auto;padding:0 1rem;background:var(--page)}
h1{margin-bottom:.2rem}h2{border-bottom:1px solid var(--line);padding-bottom:.2rem;margin-top:2.5rem}
h3{font-size:1em;margin:1.5rem 0 .3rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}\
th,td{padding:.3rem .8rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{cursor:help}abbr{text-decoration:underline dotted var(--soft);text-underline-offset:3px}
th:first-child{text-align:left;position:sticky;left:0;background:var(--page)}tbody th{font-weight:500}
td.best{font-weight:700}tr.published{color:var(--soft)}small{display:block;font-size:.75em}
small.up{color:#2a9d6f}small.down{color:#d1603d}.scroll{overflow-x:auto}
.note{color:var(--soft);font-size:.87em;margin:.3rem 0}code{font-size:.92em;overflow-wrap:anywhere}
summary{cursor:pointer;margin:.6rem 0}\
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem .9rem;margin:.3rem 0;font-size:.9em}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.charts,.pictures{display:grid;gap:1.6rem 1.2rem;margin:1.2rem 0}
.charts{grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr))}\
.pictures{grid-template-columns:repeat(auto-fill,minmax(min(380px,100%),1fr))}
figure{margin:0;min-width:0}figcaption{font-size:.9em}.chart{max-width:460px}
.compare figcaption span{display:block;color:var(--soft)}
svg{display:block;width:100%}svg text{font-size:12px;fill:currentColor}svg .grid{stroke:var(--line)}\
svg .base{stroke:var(--soft);stroke-dasharray:5 4}svg .halo{paint-order:stroke;stroke:var(--page);stroke-width:4px}
.legend{margin:.2rem 0;font-size:.87em}.legend span{margin-right:1rem}\
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.35em;border-radius:2px}
.stage{position:relative;overflow:hidden;border-radius:6px;cursor:ew-resize;touch-action:pan-y;user-select:none}
.stage img{display:block;width:100%;image-rendering:pixelated;pointer-events:none}\
.stage img.before{position:absolute;inset:0;clip-path:inset(0 50% 0 0)}
.bar{position:absolute;top:0;bottom:0;left:50%;width:2px;margin-left:-1px;background:#fff;box-shadow:0 0 4px #000;\
pointer-events:none}
.bar::after{content:"⇔";position:absolute;top:50%;left:50%;transform:translate(-50%,-50%);width:30px;height:30px;\
border-radius:50%;background:#fff;color:#222;font:18px/28px system-ui;text-align:center;box-shadow:0 0 4px #000}
.tag,.enlarge{position:absolute;background:#000a;color:#fff;border-radius:4px;font-size:.8em;padding:.1rem .45rem}
.tag{bottom:8px;pointer-events:none}.tag.before{left:8px}.tag.after{right:8px}
.enlarge{top:8px;right:8px;border:0;cursor:zoom-in;font-size:1em}
.stage input{position:absolute;left:0;bottom:0;width:1px;height:1px;opacity:0;pointer-events:none}
.stage:has(input:focus-visible){outline:3px solid #4477cc}
.choices{display:flex;justify-content:space-between;flex-wrap:wrap;gap:.3rem;margin:.4rem 0 .2rem;font-size:.9em}
dialog{max-width:98vw;max-height:98vh;padding:.8rem;border:1px solid var(--line);border-radius:8px;\
background:var(--page)}
dialog::backdrop{background:#000c}dialog .enlarge{cursor:zoom-out}
"""

SCRIPT = """
const dialog=document.querySelector("dialog");
function compare(box){
 const sources=JSON.parse(box.dataset.pictures),scores=JSON.parse(box.dataset.scores);
 const stage=box.querySelector(".stage"),range=box.querySelector("input");
 const before=box.querySelector("img.before"),bar=box.querySelector(".bar"),told=box.querySelector("figcaption span");
 const show=x=>{range.value=x;before.style.clipPath=`inset(0 ${100-x}% 0 0)`;bar.style.left=x+"%"};
 range.oninput=()=>show(range.value);
 const selects=[...box.querySelectorAll("select")];
 const choose=()=>{for(const s of selects){
  const img=box.querySelector("img."+s.dataset.side);img.src=sources[s.value];img.alt=s.value;
  box.querySelector(".tag."+s.dataset.side).textContent=s.value}
  told.innerText=selects.map(s=>scores[s.value]?s.value+": "+scores[s.value]:"").filter(x=>x).join("\\n")};
 for(const s of selects)s.onchange=choose;
 choose();
 let from=null,moved=false;
 stage.onpointerdown=e=>{if(e.button===0&&!e.target.closest("button")){from=e.clientX;moved=false;
  stage.setPointerCapture(e.pointerId)}};
 stage.onpointermove=e=>{if(from===null)return;if(Math.abs(e.clientX-from)>3)moved=true;
  if(moved){const r=stage.getBoundingClientRect();
  show(Math.min(100,Math.max(0,100*(e.clientX-r.left)/r.width)))}};
 stage.onpointerup=()=>{if(from!==null&&!moved&&!dialog.open)enlarge();from=null};
 stage.onpointercancel=()=>{from=null};
 const enlarge=()=>{
  const place=document.createElement("figure"),before_=box.querySelector("img.after");
  place.style.height=box.offsetHeight+"px";box.replaceWith(place);dialog.append(box);dialog.showModal();
  const fit=()=>{const ratio=before_.naturalWidth/before_.naturalHeight;
   stage.style.width=Math.min(innerWidth*.98-44,(innerHeight*.96-130)*ratio)+"px";box.style.width=stage.style.width};
  fit();addEventListener("resize",fit);
  dialog.onclose=()=>{removeEventListener("resize",fit);stage.style.width=box.style.width="";place.replaceWith(box)}};
 box.querySelector("button").onclick=()=>dialog.open?dialog.close():enlarge();
}
dialog.onclick=e=>{if(e.target===dialog)dialog.close()};
document.querySelectorAll(".compare").forEach(compare);
"""
