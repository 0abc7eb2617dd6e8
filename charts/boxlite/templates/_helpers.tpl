{{- define "boxlite.name" -}}
{{- printf "%s-installer" .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "boxlite.labels" -}}
app.kubernetes.io/name: boxlite
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "boxlite.selector" -}}
app.kubernetes.io/name: boxlite
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: installer
{{- end -}}

{{- define "boxlite.image" -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- end -}}
