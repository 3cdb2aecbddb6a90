"""The style sheet of the page: light, dark and on paper, from a phone to a desktop."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f3f4f6; --card: #ffffff; --ink: #1c1f23; --soft: #555c66; --line: #d8dce1;
  --faint: #8a8f98; --pale: #eceef1; --grid: #e1e4e8;
  --blue: #0072b2; --orange: #8f5d00; --green: #00805d; --vermilion: #c44f00;
  --pass: #00734f; --fail: #b3261e; --open: #855600;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #121417; --card: #1c2025; --ink: #e8eaed; --soft: #a9b0ba; --line: #363c44;
    --faint: #7f8792; --pale: #2a2f36; --grid: #2f353d;
    --blue: #5cb8ef; --orange: #f0b429; --green: #2fc398; --vermilion: #ff8a4c;
    --pass: #2fc398; --fail: #ff8a80; --open: #f0b429;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 72rem; margin: 0 auto; padding: 1.25rem .75rem 2rem; }
h1, h2, h3, p, dl, dd, figure { margin: 0; }
h1 { font-size: 1.5rem; line-height: 1.25; text-wrap: balance; }
h2 { font-size: 1.2rem; margin: 2rem 0 .75rem; }
h3 { font-size: 1rem; }
h1, h2, h3, p, dd, dt, li { overflow-wrap: anywhere; }
.soft, figcaption, .tiles dt, .tiles .more { color: var(--soft); font-size: .875rem; }
.card, .tiles > div, figure {
  background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .75rem;
}
ul, ol { padding-left: 1.25rem; margin: .375rem 0 0; }
.facts {
  display: flex; flex-wrap: wrap; gap: .375rem; list-style: none; padding: 0;
  margin: .625rem 0 1.25rem; font-size: .875rem;
}
.facts li {
  border: 1px solid var(--line); border-radius: 1rem; padding: .1rem .65rem;
  background: var(--card);
}
.banner { border-left: .375rem solid var(--open); }
.banner strong { display: block; font-size: 1.25rem; color: var(--open); }
.banner.pass { border-left-color: var(--pass); }
.banner.fail { border-left-color: var(--fail); }
.banner.pass strong, strong.pass { color: var(--pass); }
.banner.fail strong, strong.fail { color: var(--fail); }
strong.inconclusive, strong.skipped { color: var(--open); }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .625rem;
  margin: .75rem 0 0;
}
.tiles .big { font-size: 1.5rem; font-weight: 650; line-height: 1.3; }
.tiles .big, table { font-variant-numeric: tabular-nums; }
.figures { columns: 2 24rem; column-gap: .75rem; }
figure { break-inside: avoid; margin: 0 0 .75rem; }
figure.wide { column-span: all; margin-top: .75rem; }
figure.wide > div {
  display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
}
figure svg { display: block; width: 100%; max-width: 33rem; height: auto; margin: .375rem auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; }
:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .8125rem; line-height: 1.4; }
table.narrow { max-width: 46rem; }
th, td { padding: .3rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
th { font-weight: 600; }
thead th { color: var(--soft); vertical-align: bottom; }
tbody tr { border-top: 1px solid var(--line); }
tbody th { font-weight: 500; }
.verdicts th, .verdicts td { white-space: normal; }
.verdicts .said { border-top: 0; }
.verdicts .said td { padding: 0 0 .5rem; text-align: left; color: var(--soft); }
.sheet { margin: .75rem 0 0; }
.sheet h3 { display: inline; }
.sheet .scroll { margin-top: .375rem; }
.narrow th, .narrow td { white-space: normal; overflow-wrap: break-word; }
.sheet ul { color: var(--soft); font-size: .875rem; }
summary { cursor: pointer; }
@media (max-width: 24rem) {
  .card, .tiles > div, figure { padding: .625rem; }
  table { font-size: .75rem; }
  th, td { padding: .3rem .2rem; }
}
@media (min-width: 48rem) {
  main { padding: 2rem 1.5rem 3rem; }
  h1 { font-size: 1.9rem; }
  .card, .tiles > div, figure { padding: 1rem; }
  table { font-size: .875rem; }
  th, td { padding: .3rem .5rem; }
  .tiles { grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); }
}
@media print {
  :root { --page: #ffffff; }
  @page { margin: 14mm; }
  html { font-size: 9.5pt; }
  main { max-width: none; padding: 0; }
  h2, h3, summary { break-after: avoid; }
  .card, .tiles > div, tr { break-inside: avoid; }
  details.sheet { break-inside: auto; }
  .figures { columns: 2; }
  figure.wide > div { grid-template-columns: 1fr 1fr; }
  .scroll { overflow: visible; }
  table { font-size: 7.5pt; } /* the widest one fits */
  th, td { padding: .15rem .3rem; white-space: normal; }
  summary { list-style: none; }
  details::details-content { display: block; content-visibility: visible; block-size: auto; }
}
"""
