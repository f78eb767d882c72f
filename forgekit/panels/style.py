"""How the panel looks: borders and shapes in the text's own colour, so that it reads in light and dark themes.

The one fixed background (a layer that learns) has a fixed text colour: white on #1c6fd0, contrast 4.9.
"""

STYLE = """<style>
.fk-panel { max-width: 62rem; }
.fk-panel .widget-html-content, .fk-panel .jupyter-widget-html-content { line-height: 1.35; }
.fk-panel .widget-html, .fk-panel .jupyter-widgets.widget-html { height: auto; }
.fk-panel .fk-totals { margin-top: 0.4em; font-weight: 600; font-variant-numeric: tabular-nums; }
.fk-panel .fk-quiet { opacity: 0.85; font-variant-numeric: tabular-nums; }
.fk-panel .fk-warning { border-left: 3px solid currentColor; padding-left: 0.5em; }
.fk-panel h4 { margin: 0.6em 0 0.1em; font-size: inherit; font-weight: 600; }
.fk-panel pre { white-space: pre-wrap; border: 1px solid currentColor; padding: 0.5em; margin: 0.2em 0; }
.fk-panel .widget-checkbox label { display: flex; align-items: center; gap: 0.5em; }
.fk-panel .widget-checkbox input[type="checkbox"] { margin: 0 0 0 3px; flex: none; }
/* a box of which a part is on: a dash in place of the tick */
.fk-panel .fk-part input[type="checkbox"] { appearance: none; -webkit-appearance: none; width: 13px; height: 13px;
  border: 1px solid currentColor; border-radius: 2px; display: inline-grid; place-content: center; color: inherit; }
.fk-panel .fk-part input[type="checkbox"]::before { content: ""; width: 9px; height: 3px; background: currentColor; }
.fk-panel .fk-part input[type="checkbox"]:focus-visible { outline: 2px solid currentColor; outline-offset: 1px; }
/* names of rank fields are for screen readers; the column's heading is for the eye */
.fk-panel .fk-rank .widget-label { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.fk-panel .fk-expand { background: none; text-align: left; padding: 0 4px; }
/* layers: square = sliding, round = full, double edge = its keys and values are used by others, dashed = uses them */
.fk-panel .fk-cell { white-space: pre; line-height: 1.2; padding: 2px; margin: 2px; border: 1px solid currentColor;
  background: none; border-radius: 2px; font-variant-numeric: tabular-nums; overflow: hidden; }
.fk-panel .fk-cell.fk-full { border-radius: 16px; }
.fk-panel .fk-cell.fk-source { border: 3px double currentColor; padding: 0; font-size: 11px; }
.fk-panel .fk-cell.fk-shared { border-style: dashed; }
.fk-panel .fk-cell.fk-on { background: #1c6fd0; color: #ffffff; }
.fk-panel .fk-cell.fk-some { background: linear-gradient(to top, #1c6fd0 5px, transparent 5px); }
.fk-panel button:focus-visible, .fk-panel .fk-cell:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
</style>"""
