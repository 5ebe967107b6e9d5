-- Gives each role of the station the password that it should have, or none. Running it again changes nothing.
-- Variable `verifiers`: a JSON object of SCRAM verifiers by role.
SELECT format('ALTER ROLE %I PASSWORD %L', rolname, verifier)
FROM pg_authid
LEFT JOIN json_each_text(:'verifiers') AS wanted (role, verifier) ON role = rolname
WHERE
    rolname IN ('labelstation_owner', 'labelstation', 'label_studio', 'label_studio_reader')
    AND rolpassword IS DISTINCT FROM verifier
\gexec
